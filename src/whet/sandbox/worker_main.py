"""The child's side: load one function, then answer one frame after the other until the parent is gone.

Or, as a template, load the function and fork a worker for each pair of descriptors that the parent sends: the workers
then start warm, in milliseconds, however long loading takes.

Run as `python -m whet.sandbox.worker_main SPEC`. Standard library only, so that it starts in milliseconds; what
the target imports is its own affair. Signals that the trainer gets are ignored here: the parent decides who dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import gc
import importlib
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from whet.sandbox.base import JSON
from whet.sandbox.frames import encode, take

PR_SET_PDEATHSIG = 1
LONGEST = 300
"""Characters of an error's own words that are passed on."""


class TargetError(Exception):
    """The code to run cannot be found; the message stands alone, without the class name."""


def main(spec: dict[str, Any]) -> None:
    """Serve on the inherited socket. `spec`: fd, parent (process id), target, arguments, memory_mb, template."""
    _die_with(spec["parent"])
    _limit(spec["memory_mb"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.set_inheritable(spec["fd"], False)
    channel = socket.socket(fileno=spec["fd"])
    try:
        answer: Callable[[JSON], JSON] = load_function(spec["target"])(*spec["arguments"])
    except BaseException as error:  # noqa: BLE001 - SystemExit too: a module that exits cannot be served
        channel.sendall(encode({"unusable": describe(error)}))
        return
    channel.sendall(encode({"ready": True}))
    if spec["template"]:
        _fork_on_request(channel, answer)
    else:
        _serve(channel, answer)


def _serve(channel: socket.socket, answer: Callable[[JSON], JSON]) -> None:
    buffer = bytearray()
    while chunk := channel.recv(1 << 16):
        buffer += chunk
        while (frame := take(buffer)) is not None:
            channel.sendall(_reply(answer, frame["payload"]))


def _fork_on_request(requests: socket.socket, answer: Callable[[JSON], JSON]) -> None:
    """One worker for each request: a byte, with the descriptors of its channel and of what it prints."""
    gc.freeze()  # what is loaded stays shared: collections in a worker do not touch its pages
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
        if not request:
            return
        _bury()
        template = os.getpid()
        if os.fork() == 0:
            os.setsid()
            _die_with(template)
            requests.close()
            for standard in (1, 2):
                os.dup2(descriptors[1], standard)
            os.close(descriptors[1])
            channel = socket.socket(fileno=descriptors[0])
            channel.sendall(encode({"ready": True, "pid": os.getpid()}))
            _serve(channel, answer)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _bury() -> None:
    """Reap workers that ended. Not sooner: until then their process ids are surely their own."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def load_function(target: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Raises `TargetError` with a near name."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(f"{target!r} must be file.py:function or module:function")
    module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    # Not `vars`: a lazy package (trl.rewards) makes its names when they are asked for, and `dir` lists them.
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None or not callable(function):
        near = [key for key in difflib.get_close_matches(name, dir(module)) if callable(getattr(module, key, None))]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TargetError(f"{place} has no function {name!r}{hint}")
    return function


def describe(error: BaseException) -> str:
    """The error as one line, with the place that raised it."""
    if isinstance(error, TargetError):
        return str(error)[: 2 * LONGEST]
    text = f"{type(error).__name__}: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[0] != "<"]
    if frames and frames[-1].filename != __file__:
        text = f"{text[:LONGEST]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return text[: 2 * LONGEST]


def _reply(answer: Callable[[JSON], JSON], payload: JSON) -> bytes:
    """The answer's frame; whatever is raised, SystemExit included, is an answer as well."""
    try:
        return encode({"value": answer(payload)})
    except BaseException as error:  # noqa: BLE001
        return encode({"raised": describe(error)})


def _load_file(path: Path) -> ModuleType:
    """A file as a module, of its package where it lies in one (a folder with `__init__.py`): `from .x import y` works.

    Its folder goes to the *end* of the path: neighbours import, nothing is shadowed.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.py")], n=1)
        raise TargetError(f"{path} does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    path = path.resolve()
    packages = list(takewhile(lambda folder: (folder / "__init__.py").is_file(), path.parents))
    sys.path.append(str(path.parents[len(packages)]))
    if packages:
        module = importlib.import_module(".".join([*(each.name for each in reversed(packages)), path.stem]))
        if module.__file__ != str(path):
            raise TargetError(f"{path}: its package {packages[-1].name} is installed from {module.__file__} as well")
        return module
    spec = importlib.util.spec_from_file_location("whet_target", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules["whet_target"] = module
    spec.loader.exec_module(module)
    return module


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, even inside a C call. Without Linux, the closed socket has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _limit(memory_mb: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


if __name__ == "__main__":
    # Under its own name: what else imports this module must meet the same `TargetError`.
    importlib.import_module("whet.sandbox.worker_main").main(json.loads(sys.argv[1]))
