"""The template of the sandbox: confined once as its profile says, it forks a process for each program.

Run as `python -m whet.sandbox.jail PROFILE FD PACKAGES...`. Over the socket FD come requests: a byte, with the
descriptors of a control socket, of what to run (JSON in memory) and of standard input, output and error. Over the
control socket go `R` (it runs), `E` and why it does not, and when it ended `X` and its wait status; where the other
side closes it, the program is killed. The template holds no data of any program: all is read after the fork.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.sandbox import kernel, syscalls
from whet.sandbox.frames import encode

WARM = """bisect collections copy dataclasses datetime decimal fractions functools heapq itertools math operator random
re statistics string typing"""
"""Modules that are loaded once, for all programs."""
USERS = 4096
"""Processes and threads of one user, all of them together, beyond which a program without namespaces starts no more."""
REQUEST = 5
"""Descriptors that come with a request."""


class ForkServer:
    """Serves requests until the other side closes the socket."""

    def __init__(self, profile: str, requests: socket.socket) -> None:
        self._profile, self._requests = profile, requests
        self._poll = select.poll()
        self._jobs: dict[int, tuple[int, socket.socket]] = {}
        """Process and control socket, by the process's descriptor and by the socket's."""
        self._numbers: int | None = None
        if profile in ("strong", "agentic"):
            self._numbers = kernel.enter_namespaces(proc=profile == "agentic")
        elif profile == "default":
            self._rules = kernel.landlock_rules()
        if profile != "minimal":
            write, processes = profile != "default", profile == "agentic"
            self._filter = syscalls.program(write=write, processes=processes)
        kernel.prctl(kernel.SET_DUMPABLE, 0, 0, 0, 0)

    def serve(self) -> None:
        """Fork, watch and reap."""
        gc.freeze()
        self._requests.sendall(encode({"ready": True}))
        self._poll.register(self._requests, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll()}
            for descriptor in ready - {self._requests.fileno()}:
                self._attend(descriptor)
            if self._requests.fileno() in ready:  # last: a new job may get the numbers of descriptors closed above
                asked, descriptors, _, _ = socket.recv_fds(self._requests, 1, REQUEST)
                if not asked:
                    os._exit(0)  # and all that it forked with it
                self._start(descriptors)

    def _start(self, descriptors: list[int]) -> None:
        control, pid = socket.socket(fileno=descriptors[0]), None
        try:
            if self._numbers is not None:
                kernel.unshare(kernel.NEW_PID)
            pid = os.fork()
        except OSError as error:
            control.send(f"E{error}".encode())
        if pid == 0:
            self._become(control, *descriptors[1:])
        if self._numbers is not None:  # back to its own, or the next program would be numbered beside this one
            kernel.call("setns", self._numbers, kernel.NEW_PID)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        if pid is None:
            control.close()
            return
        for source, events in ((os.pidfd_open(pid), select.POLLIN), (control.fileno(), select.POLLRDHUP)):
            self._jobs[source] = (pid, control)
            self._poll.register(source, events)

    def _attend(self, descriptor: int) -> None:
        """A program ended, or is no longer wanted."""
        if descriptor not in self._jobs:
            return
        pid, control = self._forget(descriptor)
        for kill in (os.kill, os.killpg) if self._profile == "minimal" else (os.kill,):
            with contextlib.suppress(OSError):  # where it ended: what it left behind, before its number is free
                kill(pid, signal.SIGKILL)
        if descriptor == control.fileno():
            return
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            control.send(f"X{status}".encode())
        if control.fileno() in self._jobs:
            self._forget(control.fileno())
        os.close(descriptor)
        control.close()

    def _forget(self, descriptor: int) -> tuple[int, socket.socket]:
        self._poll.unregister(descriptor)
        return self._jobs.pop(descriptor)

    # ------------------------------------------------------------------------------------- in the child

    def _become(self, control: socket.socket, asked: int, *standard: int) -> None:
        """Confine this process, run the program and exit."""
        try:
            size = os.fstat(asked).st_size
            job = json.loads(os.pread(asked, size, 0))
            for number, descriptor in enumerate(standard):
                os.dup2(descriptor, number)
            self._confine(job)
            os.write(control.fileno(), b"R")  # not `send`, which is filtered by now
            os.closerange(3, 1 << 16)  # those of other programs, too
        except BaseException as error:  # noqa: BLE001 - it may not return into the template's loop
            os.write(control.fileno(), f"E{type(error).__name__}: {error}".encode())
            os._exit(1)
        run(job["program"])

    def _confine(self, job: dict[str, Any]) -> None:
        limits = job["limits"]
        os.setsid()
        kernel.prctl(kernel.SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._numbers is not None:
            kernel.own_namespaces(tools=self._profile == "agentic", disk_mb=limits["file_mb"])
            write_files("/tmp", {name: text.encode("latin-1") for name, text in job["files"].items()})
        elif job["folder"]:
            os.chdir(job["folder"])
        own = [path for path in sys.path if path.startswith(sys.base_prefix)]
        sys.path[:] = [os.getcwd(), *own, *kernel.PACKAGES]
        if self._numbers is None:  # nothing counts the program apart from the rest of its user's processes
            limits = {**limits, "processes": USERS}
        else:
            kernel.unshare(kernel.NEW_USER)
        kernel.limit(**{**limits, "file_mb": 0 if self._profile == "default" else limits["file_mb"]})
        kernel.drop_capabilities()
        if self._profile == "default":
            kernel.landlock(kernel.landlock_rules(job["folder"]) if job["folder"] else self._rules)
        if self._profile != "minimal":
            kernel.filter_calls(self._filter)


def write_files(folder: str, files: Mapping[str, bytes]) -> None:
    """Files by their names within the folder, which every user may read."""
    os.chmod(folder, 0o755)
    for name, content in files.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_bytes(content)


def run(program: str) -> None:
    """The program as `__main__`, with Python's own exit codes."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = main, ["program.py"]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which -S leaves out
    code: object = 0
    try:
        exec(compile(program, "program.py", "exec"), main.__dict__)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:  # noqa: BLE001
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        code = 1
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[2]))
    del os.environ["PYTHONPATH"]
    with contextlib.suppress(OSError):  # where memory runs out, a program is to die before the run that it serves
        Path("/proc/self/oom_score_adj").write_text("1000")
    for module in WARM.split():
        importlib.import_module(module)
    try:
        template = ForkServer(sys.argv[1], channel)
    except (OSError, KeyError, AttributeError) as reason:
        channel.sendall(encode({"unusable": f"{type(reason).__name__}: {reason}"}))
        sys.exit(1)
    template.serve()
