"""Ranks by fork: processes that have imported all that a rank needs, and fork one where it would be started.

An interpreter takes five seconds of CPU until it is a rank, and a fork a tenth of one. A fork is the same program with
the same environment; `-m whet.launch.rank` itself is started by the tests that say so. There are two such processes,
for ranks of even and of odd number: ranks of one group must not agree because their hashes have the same seed.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST_ORDER = 2**18
NUMBER = struct.Struct("i")


class Forked:
    """What `Ranks` uses of a `Popen`."""

    def __init__(self, said: int) -> None:
        """`said`: a pipe in which the pid comes first, and its exit code (negative for a signal) once it has ended."""
        self._said = said
        self.pid = _number(said)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code."""
        if self.returncode is None:
            if not select([self._said], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked rank", timeout or 0)
            self.returncode = _number(self._said)
            os.close(self._said)
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, where it has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """As `Popen.kill`."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def _number(pipe: int) -> int:
    found = os.read(pipe, NUMBER.size)
    assert found, "the process that forks has ended"
    return int(NUMBER.unpack(found)[0])


class Forker:
    """The other end of `serve`, in a process of its own."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.laws.forks", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def fork(self, words: Sequence[str], env: Mapping[str, str]) -> Forked:
        """A process with these words behind its name and this environment."""
        said, says = os.pipe()
        socket.send_fds(self._orders, [json.dumps({"words": words, "env": dict(env)}).encode()], [says])
        os.close(says)
        return Forked(said)

    def close(self) -> None:
        """End it; those that it forked go on."""
        self._orders.close()
        self._process.wait()


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Here `whet.launch.ranks` forks its ranks."""
    forkers = list[Forker]()

    def start(command: Sequence[str], *, env: Mapping[str, str], **how: Any) -> Forked:
        if not forkers:
            forkers.extend([Forker(), Forker()])
        assert command[:4] == [sys.executable, "-P", "-m", "whet.launch.rank"], "what `serve` runs"
        assert how == {"stdin": subprocess.DEVNULL, "stdout": 2, "start_new_session": True}, "what `serve` does"
        return forkers[int(env["RANK"]) % 2].fork(command[4:], env)

    names = {"Popen": start, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("whet.launch.ranks.subprocess", SimpleNamespace(**names))
        yield
    for forker in forkers:
        forker.close()


def serve(orders: socket.socket) -> None:
    """Fork for each order; returns in the forks, and ends the process with the other end of `orders`."""
    watched = selectors.DefaultSelector()
    watched.register(orders, selectors.EVENT_READ)
    while True:
        for key, _ in watched.select():
            if key.data is None:
                message, descriptors, *_ = socket.recv_fds(orders, LARGEST_ORDER, 1)
                if not message:
                    sys.exit()
                (says,) = descriptors
                pid = os.fork()
                if pid == 0:
                    watched.close()  # by its object, which must not do it when the number is another file's
                    orders.close()
                    _become(**json.loads(message))
                    return
                os.write(says, NUMBER.pack(pid))
                watched.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, says))
            else:
                pid, says = key.data
                os.write(says, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                watched.unregister(key.fileobj)
                os.close(key.fd)
                os.close(says)


def _become(words: Sequence[str], env: Mapping[str, str]) -> None:
    """A process that was started with these words and this environment; of the one that forked it no file is open."""
    os.setsid()
    os.closerange(3, 1024)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.argv[1:] = words
    os.environ.clear()
    os.environ.update(env)


if __name__ == "__main__":
    import torch

    import tests.laws.test_ranks  # noqa: F401  what the ranks are told to run
    from whet.config import ModelConfig
    from whet.launch import rank
    from whet.models.load import load_model

    torch.set_num_threads(1)
    load_model(ModelConfig(path="whet:demo"))  # transformers imports a model's module when it is asked for
    serve(socket.socket(fileno=int(sys.argv[1])))
    rank.main()
