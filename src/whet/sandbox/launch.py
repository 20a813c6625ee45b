"""Starting worker processes: each on its own, or forked from a template that has loaded what they all need."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from whet.sandbox.base import JSON
from whet.sandbox.frames import take

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
BOOT = """
import importlib, importlib.util, json, sys
spec, package = json.loads(sys.argv[1]), sys.argv[2]
found = importlib.util.spec_from_file_location("whet", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["whet"] = importlib.util.module_from_spec(found)
found.loader.exec_module(sys.modules["whet"])
importlib.import_module("whet.sandbox.worker_main").main(spec)
"""
"""Starts a worker in an interpreter of another environment, which finds this package there and nothing beside it."""
POLL_S = 0.1
"""How soon a wait for a template notices that it is no longer wanted."""


def start(
    spec: Mapping[str, JSON], channel: socket.socket, printing: int, *, template: bool, python: str = ""
) -> subprocess.Popen[bytes]:
    """A process of `worker_main` that serves `channel` and prints into the pipe `printing`. Raises OSError.

    `python`: the interpreter of another environment, which has its own packages and of ours only this one.
    """
    whole = {"options": {}, "talks": False, **spec, "fd": channel.fileno(), "parent": os.getpid(), "template": template}
    environ, how = dict(os.environ), ["-c", BOOT, json.dumps(whole), str(PACKAGE_ROOT / "whet")]
    if python:  # as where its environment is activated
        environ["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
    else:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        how = ["-m", "whet.sandbox.worker_main", json.dumps(whole)]
    # -P: a file of the working folder cannot shadow a module; -u: what it prints before it dies is seen.
    return subprocess.Popen(
        [python or sys.executable, "-P", "-u", *how],
        stdin=subprocess.DEVNULL,
        stdout=printing,
        stderr=printing,
        pass_fds=[channel.fileno()],
        start_new_session=True,
        env=environ,
    )


class WarmTemplate:
    """A loaded process that forks others. It is started by the first `fork`, and again where it died.

    `begin` starts it, given its end of a socket; it then sends a frame, with `unusable` in it where it is that.
    """

    def __init__(self, begin: Callable[[socket.socket], subprocess.Popen[bytes]], startup_s: float) -> None:
        self._begin, self._startup_s = begin, startup_s
        self.process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._begun_by = 0

    def fork(self, descriptors: Sequence[int], unwanted: Callable[[], bool]) -> str:
        """Start one with these descriptors; why there is none, where there is none. `unwanted` ends a wait.

        A fork of the process that began it may do so as well; whether it lives is then seen by trying.
        """
        alive = self.process is not None and (self._begun_by != os.getpid() or self.process.poll() is None)
        if not alive and (failure := self._load(unwanted)):
            self.close()
            return failure
        assert self._requests is not None, "loaded"
        try:
            socket.send_fds(self._requests, [b"f"], list(descriptors))
        except OSError as error:
            self.close()
            return f"the template died: {error}"
        return ""

    def close(self) -> None:
        """End it. Workers that it forked die with it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self._requests is not None:
            self._requests.close()
        self.process = self._requests = None

    def _load(self, unwanted: Callable[[], bool]) -> str:
        self.close()
        self._requests, theirs = socket.socketpair()
        with theirs:
            self.process, self._begun_by = self._begin(theirs), os.getpid()
        deadline, inbox = time.monotonic() + self._startup_s, bytearray()
        self._requests.settimeout(POLL_S)
        while not unwanted():
            try:
                chunk = self._requests.recv(1 << 16)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    return f"did not start within {self._startup_s:g} s and was killed"
                continue
            if not chunk:
                return f"the template exited with code {self.process.wait()} while it loaded"
            inbox += chunk
            if (frame := take(inbox)) is not None:
                self._requests.settimeout(None)
                return str(frame.get("unusable", ""))
        return "the pool was closed"
