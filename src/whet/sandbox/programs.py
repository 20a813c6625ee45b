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
from functools import partial
from pathlib import Path, PurePath

from whet.errors import SandboxError
from whet.sandbox.base import USUAL, Limits, ProgramOutcome, Status
from whet.sandbox.canaries import summary, try_out, unheld
from whet.sandbox.jail import write_files
from whet.sandbox.launch import PACKAGE_ROOT, WarmTemplate

STARTUP_S = 60.0
"""Until a template is loaded, or a process forked and confined: a slow machine is no program's fault."""
FOREVER_S = 1 << 30
"""A session's CPU limit: each of its replies has a deadline."""
LOOK_S = 0.25
"""How often the memory of processes that share a limit is summed."""
CHUNK, CONTROL = 1 << 16, "print('ok')"


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
        self, program: str, files: Mapping[str, bytes] = {}, stdin: bytes = b"", limits: Limits = USUAL
    ) -> ProgramOutcome:
        """Run it to its end."""
        running = self._threads.submit(self.run_now, program, files, stdin, limits)
        return await asyncio.wrap_future(running)

    def run_now(self, program: str, files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> ProgramOutcome:
        """The same, waiting. What the machinery loses is run again in a sandbox of its own."""
        first = _run(self._template, program, files, stdin, limits)
        if self._template.closed:
            return first
        return settle(
            first, lambda: _alone(self.profile, program, files, stdin, limits), lambda: _alone(self.profile, CONTROL)
        )

    async def open(self, program: str, files: Mapping[str, bytes] = {}, limits: Limits = USUAL) -> LocalSession:
        """Start it, to be asked line by line."""
        return await asyncio.to_thread(LocalSession, self._template, program, files, limits)

    def close(self) -> None:
        """Kill what runs."""
        self._template.close()
        self._threads.shutdown()


class LocalSession:
    """A program that reads lines from standard input and replies on standard output."""

    def __init__(self, template: _Template, program: str, files: Mapping[str, bytes], limits: Limits) -> None:
        self._limits, self._closed, self._turn = limits, False, threading.Lock()
        self._ended: ProgramOutcome | None = None
        self._job: _Job | None = None
        try:
            lines, theirs = socket.socketpair()
            with theirs:
                self._job = _Job(template, program, files, theirs.fileno(), limits, cpu_s=FOREVER_S, lines=lines)
        except OSError as error:
            self._ended = _lost(error)

    async def ask(self, line: str, *, deadline_s: float | None = None) -> ProgramOutcome:
        """Its reply to a line."""
        return await asyncio.to_thread(self._ask, line, self._limits.deadline_s if deadline_s is None else deadline_s)

    def _ask(self, line: str, seconds: float) -> ProgramOutcome:
        with self._turn:
            if self._job is None or self._ended is not None or self._closed:
                return self._ended or ProgramOutcome(status=Status.MACHINERY, note="the session is closed")
            self._job.tell(line.encode() + b"\n")
            status = self._job.watch(seconds, line=True)
            if status is None:
                said = self._job.outcome(Status.FINISHED, line=True)
            else:
                said = self._ended = self._job.outcome(Status.EXITED if status is Status.FINISHED else status)
        if self._ended or self._closed:
            self._close()
        return said

    async def close(self) -> None:
        """Kill it."""
        self._close()

    def _close(self) -> None:
        """Also while it is asked: that ends then, and lets go of it, for its descriptors may not be another's yet."""
        self._closed = True
        if self._job is not None:
            self._job.stop()
            if self._turn.acquire(blocking=False):
                self._job.close()
                self._turn.release()


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
        self,
        template: _Template,
        program: str,
        files: Mapping[str, bytes],
        stdin: int,
        limits: Limits,
        *,
        cpu_s: int,
        lines: socket.socket | None = None,
    ) -> None:
        for path in map(PurePath, files):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"file name {str(path)!r} leads out of the working folder")
        self._most, self._memory = limits.output_kb << 10, limits.memory_mb << 20
        self._shared, self._pid, self._begun = template.profile == "agentic", 0, False
        self._code, self._since = 0, 0.0
        """The exit code, or minus the signal."""
        self._over: Status | None = None
        self._poll = select.poll()
        self._written: dict[int, bytearray] = {}
        self._lines, self._unsent = lines, bytearray()
        named = {name: content.decode("latin-1") for name, content in files.items()}
        most = {name: getattr(limits, name) for name in ("memory_mb", "file_mb", "processes")}
        with ExitStack() as held, ExitStack() as given:
            folder, writing = None, []
            if lines is not None:
                held.enter_context(lines).setblocking(False)
            if files and template.profile in ("default", "minimal"):  # the others have a file system of their own
                folder = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                write_files(folder, files)
            job = {"program": program, "files": named, "limits": {**most, "cpu_s": cpu_s}, "folder": folder}
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            held.enter_context(self._control)
            given.enter_context(theirs)
            self._control.setsockopt(
                socket.SOL_SOCKET, socket.SO_PASSCRED, 1
            )  # tells the process's number as seen here
            self._poll.register(self._control, select.POLLIN)
            for _ in range(2):
                reading, end = os.pipe()
                held.callback(os.close, reading)
                given.callback(os.close, end)
                writing.append(end)
                os.set_blocking(reading, False)
                self._poll.register(reading, select.POLLIN)
                self._written[reading] = bytearray()
            payload = given.enter_context(_memory(json.dumps(job).encode()))
            self.note = template.fork([theirs.fileno(), payload, stdin, *writing])
            self._held = held.pop_all()

    def tell(self, text: bytes) -> None:
        """Have `watch` send it, as fast as it is read: what the program writes meanwhile is read as ever."""
        assert self._lines is not None, "a session"
        self._unsent += text
        self._poll.register(self._lines, select.POLLOUT)

    def watch(self, seconds: float, *, line: bool = False) -> Status | None:
        """Until it ended or is late; None as soon as it wrote a whole line, where a `line` is awaited."""
        output, look = next(iter(self._written.values())), 0.0
        self._since = time.monotonic()
        while not (line and b"\n" in output):
            if self._over is not None:  # all that it wrote is read by now, and may say more
                return self._over if self._over is Status.MACHINERY else self._status()
            begun = self._begun
            left = self._since + (seconds if begun else STARTUP_S) - time.monotonic()
            ready = {source for source, _ in self._poll.poll(max(0.0, min(left, LOOK_S)) * 1000)}
            if self._control.fileno() in ready:
                self._over = self._hear()
            if self._lines is not None and self._lines.fileno() in ready:
                self._send(self._lines)
            drain = self._over is not None or left <= 0  # where this thread comes late, the reply may have come in time
            for source in self._written if drain else ready & self._written.keys():
                self._read(source, drain=drain)
            if any(len(text) > self._most for text in self._written.values()):
                return Status.OUTPUT
            if self._over is not None:  # after what it wrote at last
                continue
            if self._begun and not begun:
                self._since = time.monotonic()
            elif left <= 0 and not (line and b"\n" in output):
                return Status.TIMEOUT if begun else Status.MACHINERY
            if self._shared and self._pid and time.monotonic() >= look:
                if _resident(self._pid) > self._memory:
                    return Status.MEMORY
                look = time.monotonic() + LOOK_S
        return None

    def _send(self, lines: socket.socket) -> None:
        """As much as it has room for."""
        try:
            del self._unsent[: lines.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # it is gone, or reads no more: its end or its deadline says which
            self._unsent.clear()
        if not self._unsent:
            self._poll.unregister(lines)

    def _hear(self) -> Status | None:
        """Its status by the template's report; None where it goes on."""
        try:
            said, extra, _, _ = self._control.recvmsg(CHUNK, 256)
        except OSError:
            said, extra = b"", []
        if said == b"R":
            self._begun, self._pid = True, int.from_bytes(extra[0][2][:4], sys.byteorder)
            return None
        if said[:1] == b"X" and self._begun:
            self._code = os.waitstatus_to_exitcode(int(said[1:]))
            return self._status()
        self.note = self.note or said[1:].decode(errors="replace") or "the template died"
        return Status.MACHINERY

    def _status(self) -> Status:
        if self._code <= 0:
            return Status.SIGNALLED if self._code else Status.FINISHED
        *_, errors = self._written.values()
        last = errors.rstrip().rpartition(b"\n")[2]
        return Status.MEMORY if last.startswith(b"MemoryError") else Status.EXITED

    def _read(self, source: int, *, drain: bool) -> None:
        """What is there; with `drain` all that was written, for which the end of the pipe is not waited."""
        with suppress(BlockingIOError):
            while chunk := os.read(source, CHUNK):
                self._written[source] += chunk
                if not drain or len(self._written[source]) > self._most:
                    return
            with suppress(KeyError):  # the end, found before
                self._poll.unregister(source)

    def outcome(self, status: Status, *, line: bool = False) -> ProgramOutcome:
        """What it wrote since the last one: a line of standard output, or all."""
        output, errors = self._written.values()
        end = output.index(b"\n") + 1 if line else len(output)
        found = ProgramOutcome(
            status=status,
            stdout=output[:end].decode(errors="replace"),
            stderr=errors.decode(errors="replace"),
            exit_code=self._code if status in (Status.FINISHED, Status.EXITED) and not line else None,
            wall_s=time.monotonic() - self._since if self._begun else 0.0,
            note=self.note,
        )
        del output[:end], errors[:]
        return found

    def stop(self) -> None:
        """Kill it where it still runs; a thread in `watch` gets MACHINERY."""
        with suppress(OSError):  # it is closed
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Kill it where it still runs, and release its resources."""
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


def settle(
    first: ProgramOutcome, again: Callable[[], ProgramOutcome], control: Callable[[], ProgramOutcome]
) -> ProgramOutcome:
    """The outcome, or where the machinery failed that of a second try; if it fails too, a control says whose fault."""
    if first.status is not Status.MACHINERY:
        return first
    second = again()
    if second.status is not Status.MACHINERY:
        return second
    broke = control().stdout == "ok\n"
    return ProgramOutcome(status=Status.BROKE if broke else Status.MACHINERY, note=second.note)


def _alone(
    profile: str, program: str, files: Mapping[str, bytes] = {}, stdin: bytes = b"", limits: Limits = USUAL
) -> ProgramOutcome:
    with _Template(profile) as template:
        return _run(template, program, files, stdin, limits)


def _run(template: _Template, program: str, files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> ProgramOutcome:
    try:
        with _memory(stdin) as given:
            job = _Job(template, program, files, given, limits, cpu_s=int(limits.deadline_s) + 2)
    except OSError as error:
        return _lost(error)
    try:
        return job.outcome(job.watch(limits.deadline_s) or Status.MACHINERY)
    finally:
        job.close()


def _lost(error: OSError) -> ProgramOutcome:
    """What could not be started, for want of descriptors, memory or room on the disk."""
    return ProgramOutcome(status=Status.MACHINERY, note=str(error))
