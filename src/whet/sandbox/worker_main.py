"""The child's side: load one function, then answer one frame after the other until the parent is gone.

Or, as a template, load the function and fork a worker for each pair of descriptors that the parent sends: the workers
then start warm, in milliseconds, however long loading takes.

Run as `python -m whet.sandbox.worker_main SPEC`. Standard library only, so that it starts in milliseconds; what
the target imports may take longer. Signals that the trainer gets are ignored here: the parent kills workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from whet.sandbox.base import JSON
from whet.sandbox.frames import encode, take
from whet.target import describe, load_function

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(spec: dict[str, Any]) -> None:
    """Serve on the inherited socket. `spec`: fd, parent (process id), target, arguments, memory_mb, template, talks.

    What `talks` is given the socket itself, and is not called for each frame.
    """
    _die_with(spec["parent"])
    _limit(spec["memory_mb"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.set_inheritable(spec["fd"], False)
    channel = socket.socket(fileno=spec["fd"])
    try:
        made = load_function(spec["target"])(*spec["arguments"], **spec["options"])
    except BaseException as error:  # noqa: BLE001 - SystemExit too: a module that exits cannot be served
        channel.sendall(encode({"unusable": describe(error)}))
        return
    channel.sendall(encode({"ready": True, "pid": os.getpid()}))
    serve: Callable[[socket.socket], None] = made if spec["talks"] else partial(_serve, answer=made)
    if spec["template"]:
        _fork_on_request(channel, serve)
    else:
        serve(channel)


def _serve(channel: socket.socket, answer: Callable[[JSON], JSON]) -> None:
    buffer, process = bytearray(), os.getpid()
    while chunk := channel.recv(1 << 16):
        buffer += chunk
        while (frame := take(buffer)) is not None:
            reply = _reply(answer, frame["payload"])
            if os.getpid() != process:  # a copy that the function forked and that returned: one answers, not both
                os._exit(1)
            channel.sendall(reply)


def _fork_on_request(requests: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    """One worker for each request: a byte, with the descriptors of its channel and of what it prints."""
    gc.freeze()  # what is loaded stays shared: collections in a worker do not touch its pages
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
        if not request:
            return
        _bury()
        template = os.getpid()
        if os.fork() == 0:
            requests.close()
            parent = _under_keeper(template, descriptors) if sys.platform == "linux" else template
            os.setsid()
            _die_with(parent)
            for standard in (1, 2):
                os.dup2(descriptors[1], standard)
            os.close(descriptors[1])
            channel = socket.socket(fileno=descriptors[0])
            channel.sendall(encode({"ready": True, "pid": os.getpid()}))
            serve(channel)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _under_keeper(template: int, descriptors: list[int]) -> int:
    """Fork a worker, and return in it alone, with the number of its parent.

    This process is that parent: the worker may kill it without harm to the others, and it ends what the worker leaves
    behind in other sessions.
    """
    _die_with(template)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        return keeper
    for descriptor in descriptors:
        os.close(descriptor)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # until it is reaped, its number is surely its own
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    with contextlib.suppress(OSError):  # a kernel that lists no children
        while orphans := Path(f"/proc/self/task/{keeper}/children").read_text().split():
            for orphan in map(int, orphans):
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)
    os._exit(0)


def _bury() -> None:
    """Reap workers that ended. Not sooner: until then their process ids are surely their own."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _reply(answer: Callable[[JSON], JSON], payload: JSON) -> bytes:
    """The answer's frame; whatever is raised, SystemExit included, is an answer as well."""
    try:
        return encode({"value": answer(payload)})
    except BaseException as error:  # noqa: BLE001
        return encode({"raised": describe(error)})


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, even inside a C call. Without Linux, the closed socket has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _limit(memory_mb: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory runs out, code that leaks is to die before the run that it serves
        Path("/proc/self/oom_score_adj").write_text("1000")
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


if __name__ == "__main__":
    # Under its own name: what else imports this module must meet the same `TargetError`.
    importlib.import_module("whet.sandbox.worker_main").main(json.loads(sys.argv[1]))
