"""Programs that a model wrote, each in a process of its own that is forked warm, confined, and killed from outside.

Which protections hold is found by trying them (`canaries`), and a profile whose own do not hold is refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from whet.errors import SandboxError
from whet.sandbox.base import Limits, Outcome, Status
from whet.sandbox.canaries import summary, try_out, unheld
from whet.sandbox.launch import PACKAGE_ROOT, WarmTemplate

STARTUP_S = 60.0
"""Until a template is loaded, or a process forked and confined: a slow machine is no program's fault."""
FOREVER_S = 1 << 30
"""A session's CPU limit: each of its replies has a deadline."""
LOOK_S = 0.25
"""How often the memory of processes that share a limit is summed."""
CHUNK = 1 << 16
CONTROL = "print('ok')"


class LocalSandbox:
    """Programs on this machine. `profile` is strong, default, agentic, minimal, or auto: strong, else default.

    At most `workers` run at once. Raises `SandboxError` where the profile's protections cannot be had.
    """

    def __init__(self, profile: str = "auto", *, workers: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="whet-sandbox")
        missing = [] if sys.platform == "linux" else [f"{sys.platform}: no isolation is known"]
        for tried in () if missing else ("strong", "default") if profile == "auto" else (profile,):
            self._template = _Template(tried)
            try:
                self.protections = try_out(partial(_run, self._template))
                if not (lost := unheld(tried, self.protections)):
                    self.profile = tried
                    return
                missing.append(f"{tried}: nothing keeps programs from {', '.join(lost)}")
            except SandboxError as error:
                missing.append(f"{tried}: {error}")
            self._template.close()
        self._threads.shutdown()
        raise SandboxError(
            f"sandbox {profile}: {'; '.join(missing)}; use a kernel with Landlock (Linux 5.13 or newer) or user "
            "namespaces, the address of a SandboxFusion server, or minimal, which keeps programs from nothing"
        )

    def describe(self) -> str:
        """What was tried and held, and what did not, in one line."""
        return f"sandbox {self.profile}: {summary(self.protections)}"

    async def run(
        self, program: str, files: Mapping[str, bytes] = {}, stdin: bytes = b"", limits: Limits = Limits()
    ) -> Outcome:
        """Run it to its end."""
        running = self._threads.submit(self.run_now, program, files, stdin, limits)
        return await asyncio.wrap_future(running)

    def run_now(self, program: str, files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> Outcome:
        """The same, waiting. What the machinery loses is run again in a sandbox of its own."""
        first = _run(self._template, program, files, stdin, limits)
        if self._template.closed:
            return first
        return settle(
            first, lambda: _alone(self.profile, program, files, stdin, limits), lambda: _alone(self.profile, CONTROL)
        )

    async def open(self, program: str, files: Mapping[str, bytes] = {}, limits: Limits = Limits()) -> LocalSession:
        """Start it, to be asked line by line."""
        return await asyncio.to_thread(LocalSession, self._template, program, files, limits)

    def close(self) -> None:
        """Kill what runs."""
        self._template.close()
        self._threads.shutdown()


class LocalSession:
    """A program that reads lines from standard input and replies on standard output."""

    def __init__(self, template: _Template, program: str, files: Mapping[str, bytes], limits: Limits) -> None:
        self._limits = limits
        self._ended: Outcome | None = None
        self._lines, theirs = socket.socketpair()
        with theirs:
            self._job = _Job(template, program, files, theirs.fileno(), limits, cpu_s=FOREVER_S)

    async def ask(self, line: str, *, deadline_s: float | None = None) -> Outcome:
        """Its reply to a line."""
        return await asyncio.to_thread(self._ask, line, deadline_s or self._limits.deadline_s)

    def _ask(self, line: str, seconds: float) -> Outcome:
        if self._ended is not None:
            return self._ended
        self._lines.settimeout(seconds)
        with suppress(OSError):  # it is gone, or does not read: `watch` says which
            self._lines.sendall(line.encode() + b"\n")
        status = self._job.watch(seconds, line=True)
        if status is None:
            return self._job.outcome(Status.FINISHED, line=True)
        self._ended = self._job.outcome(Status.EXITED if status is Status.FINISHED else status)
        self._close()
        return self._ended

    async def close(self) -> None:
        """Kill it."""
        self._close()

    def _close(self) -> None:
        self._job.close()
        self._lines.close()


class _Template:
    """The process that forks programs, for any thread."""

    def __init__(self, profile: str) -> None:
        self.profile, self.closed, self._lock = profile, False, threading.Lock()
        self._warm = WarmTemplate(partial(_begin, profile), STARTUP_S)

    def __enter__(self) -> _Template:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fork(self, descriptors: list[int]) -> str:
        """Start a process with these; why there is none, where there is none."""
        with self._lock:
            return "the sandbox is closed" if self.closed else self._warm.fork(descriptors, lambda: self.closed)

    def close(self) -> None:
        """End it, and with it all that it forked."""
        self.closed = True
        with self._lock:
            self._warm.close()


def _begin(profile: str, theirs: socket.socket) -> subprocess.Popen[bytes]:
    packages = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    command = [sys.executable, "-sSPB", "-X", "utf8", "-m", "whet.sandbox.jail", profile, str(theirs.fileno())]
    return subprocess.Popen(
        [*command, *packages],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        cwd="/",
        env={"PYTHONPATH": str(PACKAGE_ROOT), "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
    )


class _Job:
    """One program's process, as seen from outside."""

    def __init__(
        self, template: _Template, program: str, files: Mapping[str, bytes], stdin: int, limits: Limits, *, cpu_s: int
    ) -> None:
        self._limits, self._begun = limits, False
        self._ended = (0, 0.0, 0)
        self._held = ExitStack()
        self._memory_of = _resident if template.profile == "agentic" else None
        self._pid: int | None = None
        folder = None
        if files and template.profile in ("default", "minimal"):
            folder = self._held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            os.chmod(folder, 0o755)
            for name, content in files.items():
                Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, name).write_bytes(content)
        named = {name: content.decode("latin-1") for name, content in files.items()}
        most = {"memory_mb": limits.memory_mb, "cpu_s": cpu_s, "file_mb": limits.file_mb}
        most["processes"] = limits.processes
        asked = json.dumps({"program": program, "files": named, "limits": most, "folder": folder})
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._held.enter_context(self._control)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._written: dict[int, bytearray] = {}
        ends = []
        for _ in range(2):
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            self._held.callback(os.close, reading)
            self._written[reading] = bytearray()
            ends.append(writing)
        with theirs, _memory(asked.encode()) as payload:
            self.note = template.fork([theirs.fileno(), payload, stdin, *ends])
        for end in ends:
            os.close(end)
        self._poll = select.poll()
        for source in (self._control.fileno(), *self._written):
            self._poll.register(source, select.POLLIN)

    def watch(self, seconds: float, *, line: bool = False) -> Status | None:
        """Until it ended or is late; None as soon as it wrote a whole line, where a `line` is awaited."""
        deadline = time.monotonic() + (seconds if self._begun else STARTUP_S)
        output = self._written[next(iter(self._written))]
        while True:
            if line and b"\n" in output:
                return None
            left = deadline - time.monotonic()
            ready = {source for source, _ in self._poll.poll(max(0.0, min(left, LOOK_S)) * 1000)}
            for source in ready & self._written.keys():
                self._read(source)
            if any(len(text) > self._limits.output_kb << 10 for text in self._written.values()):
                return Status.OUTPUT
            if self._control.fileno() in ready:
                begun = self._begun
                if (status := self._hear()) is not None:
                    for source in self._written:  # what it had written before it ended, and no more
                        while self._read(source) and len(self._written[source]) <= self._limits.output_kb << 10:
                            pass
                    return status
                if self._begun and not begun:
                    deadline = time.monotonic() + seconds
            elif left <= 0:
                return Status.TIMEOUT if self._begun else Status.MACHINERY
            if self._memory_of is not None and self._pid is not None and not ready:
                if self._memory_of(self._pid) > self._limits.memory_mb << 20:
                    return Status.MEMORY

    def _hear(self) -> Status | None:
        """What the template says of it; None where it goes on."""
        try:
            said, extra, _, _ = self._control.recvmsg(CHUNK, 256)
        except OSError:
            said, extra = b"", []
        match said[:1]:
            case b"R":
                self._begun = True
                self._pid = next((int.from_bytes(data[:4], sys.byteorder) for _, _, data in extra), None)
                return None
            case b"X" if self._begun:
                status, cpu_s, most_kb = said[1:].split()
                self._ended = (int(status), float(cpu_s), int(most_kb))
                return _status(int(status), self._written)
        self.note = self.note or said[1:].decode(errors="replace") or "the template died"
        return None if said[:1] == b"E" and self._begun else Status.MACHINERY

    def _read(self, source: int) -> bool:
        try:
            chunk = os.read(source, CHUNK)
        except BlockingIOError:
            return False
        self._written[source] += chunk
        if not chunk:
            with suppress(KeyError):  # found before
                self._poll.unregister(source)
        return bool(chunk)

    def outcome(self, status: Status, *, line: bool = False) -> Outcome:
        """What it wrote since the last one: a line of standard output, or all."""
        output, errors = self._written.values()
        end = output.index(b"\n") + 1 if line else len(output)
        code = os.waitstatus_to_exitcode(self._ended[0])
        found = Outcome(
            status=status,
            stdout=output[:end].decode(errors="replace"),
            stderr=errors.decode(errors="replace"),
            exit_code=code if status in (Status.FINISHED, Status.EXITED, Status.SIGNALLED) and not line else None,
            cpu_s=self._ended[1],
            memory_mb=self._ended[2] / 1024,
            note=self.note,
        )
        del output[:end], errors[:]
        return found

    def close(self) -> None:
        """Kill it where it still runs, and let go of what was its."""
        self._held.close()


@contextmanager
def _memory(content: bytes) -> Iterator[int]:
    """A descriptor from which it can be read."""
    with os.fdopen(os.memfd_create("whet"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file.fileno()


def _resident(pid: int) -> int:
    """Bytes in use by a process and all that descend from it; what ended meanwhile counts nothing."""
    total, waiting = 0, [pid]
    while waiting:
        place = Path("/proc", str(waiting.pop()))
        with suppress(OSError):
            total += int((place / "statm").read_text().split()[1]) * resource.getpagesize()
            for thread in (place / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
    return total


def settle(first: Outcome, again: Callable[[], Outcome], control: Callable[[], Outcome]) -> Outcome:
    """The outcome, or where the machinery failed that of a second try; if it fails too, a control says whose fault."""
    if first.status is not Status.MACHINERY:
        return first
    second = again()
    if second.status is not Status.MACHINERY:
        return second
    broke = control().stdout == "ok\n"
    return Outcome(status=Status.BROKE if broke else Status.MACHINERY, note=second.note)


def _alone(
    profile: str, program: str, files: Mapping[str, bytes] = {}, stdin: bytes = b"", limits: Limits = Limits()
) -> Outcome:
    with _Template(profile) as template:
        return _run(template, program, files, stdin, limits)


def _run(template: _Template, program: str, files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> Outcome:
    with _memory(stdin) as given:
        job = _Job(template, program, files, given, limits, cpu_s=int(limits.deadline_s) + 2)
        try:
            return job.outcome(job.watch(limits.deadline_s) or Status.MACHINERY)
        finally:
            job.close()


def _status(wait_status: int, written: Mapping[int, bytearray]) -> Status:
    code = os.waitstatus_to_exitcode(wait_status)
    if code == 0:
        return Status.FINISHED
    if code < 0:
        return Status.SIGNALLED
    *_, errors = written.values()
    return Status.MEMORY if errors.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError") else Status.EXITED
