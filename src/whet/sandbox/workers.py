"""A pool of processes that answer payloads, each within a deadline, counted and enforced from outside.

A timeout inside the process does not hold: signals wait for C code to return, threads cannot be ended. So every
worker is a process in its own session, watched with a monotonic clock and killed, with all it started, when it is
late. A new one takes its place and the other payloads go on.

    with WorkerPool("grading.py:load", deadline_s=2) as pool:       # load() returns the function that answers
        results = pool.map([{"answer": "42"}, {"answer": "9^9^9^9"}])

One thread, the keeper, starts the processes and reads from them, whichever thread calls. That makes calls queue up,
keeps an interrupted call from leaving its answers to the next one, and satisfies Linux, which takes "die with the
parent" to mean the *thread* that started the process.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from whet.sandbox.base import JSON, Failure, FailureKind, Result
from whet.sandbox.frames import encode, take
from whet.sandbox.launch import WarmTemplate, start

TAIL_BYTES = 2000
"""How much of what a worker printed is kept, for the message if it dies."""
MESSAGE_CHARACTERS = 400
CLOSE_POLL_S = 0.2
"""How soon a running call notices that its pool was closed."""
LONG_S = 0.25
"""After so long a payload no longer holds up the others, where workers are forked: one more takes its place."""
CHUNK_BYTES, CHUNKS = 1 << 16, 64
"""Read at most so much in one go: a worker that prints without end may not hold up the others."""
REAP_S = 10.0
"""Longest wait for the kernel to bury a killed process."""

_Job = tuple[int, bytes]
"""The place of a payload in its call, and its frame."""


class WorkerPool:
    """Up to `workers` processes, started when there is work for them.

    `target` is `module:function` or `file.py:function`; it is called once in each process with `arguments` and
    returns the function that answers payloads. `deadline_s` holds for one payload, `startup_s` for starting and
    importing (generous: a slow disk is no failure). `memory_mb` limits the address space; None where the code may
    reserve much more than it uses, as CUDA does. A process is replaced after `recycle_after` answers, for leaks.

    `forked` workers come from a template process that has loaded the target: a killed one is replaced in milliseconds.
    For targets that start no threads and hold no device.
    """

    def __init__(
        self,
        target: str,
        *,
        deadline_s: float,
        arguments: Sequence[JSON] = (),
        workers: int = 1,
        startup_s: float = 120.0,
        memory_mb: int | None = None,
        recycle_after: int = 1000,
        forked: bool = False,
    ) -> None:
        self._spec: dict[str, JSON] = {"target": target, "arguments": list(arguments), "memory_mb": memory_mb}
        self._limit, self._deadline_s, self._startup_s = workers, deadline_s, startup_s
        self._recycle_after = recycle_after
        begin = partial(start, self._spec, printing=subprocess.DEVNULL, template=True)
        self._template = WarmTemplate(begin, startup_s) if forked else None
        self._workers: list[_Worker] = []
        self._fallen: subprocess.Popen[bytes] | None = None
        """The template that died in this call, if one did."""
        self._closing = threading.Event()
        self._keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whet-workers")

    def map(self, payloads: Sequence[JSON]) -> list[Result]:
        """One result for each payload, in order; never raises for what a worker does. Callable from any thread."""
        assert not self._closing.is_set(), "the pool is closed"
        return self._keeper.submit(self._run, payloads).result()

    def close(self) -> None:
        """Kill the workers; a call that is running returns failures. May be called twice."""
        if not self._closing.is_set():
            self._closing.set()
            self._keeper.submit(self._kill_all).result()
            self._keeper.shutdown()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------- in the keeper's thread

    def _run(self, payloads: Sequence[JSON]) -> list[Result]:
        results: dict[int, Result] = {}
        jobs: deque[_Job] = deque()
        self._fallen = None
        for index, payload in enumerate(payloads):
            try:
                jobs.append((index, encode({"payload": payload})))
            except (TypeError, ValueError, RecursionError) as error:
                results[index] = _failed(FailureKind.RAISED, f"the payload cannot be sent: {error}")
        while len(results) < len(payloads):
            if self._closing.is_set():
                self._kill_all()
                lost = _failed(FailureKind.CRASH, "the pool was closed")
                return [results.get(index, lost) for index in range(len(payloads))]
            self._staff(jobs, results)
            self._wait()
            for worker in tuple(self._workers):
                self._attend(worker, jobs, results)
        for worker in self._workers[self._limit :]:
            self._drop(worker)
        return [results[index] for index in range(len(payloads))]

    def _staff(self, jobs: deque[_Job], results: dict[int, Result]) -> None:
        """Give every idle worker a job, and start as many more as there is work for."""
        for worker in tuple(self._workers):
            if worker.ready and worker.job is None and jobs:
                job = jobs.popleft()
                try:
                    worker.send(job, self._deadline_s)
                except ConnectionError:
                    self._drop(worker)
                    if worker.answered or self._fell(worker):  # it died while idle: not this job's fault
                        jobs.appendleft(job)
                    else:
                        results[job[0]] = _failed(FailureKind.CRASH, "the worker died before it took the payload")
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self._limit + self._stuck() - len(self._workers), len(jobs) - starting)):
            worker = _Worker(self._startup_s)
            try:
                failure = worker.start(self._spec, self._template, self._closing.is_set)
            except OSError as error:
                failure = f"no process could be started: {error}"
            if failure:
                worker.kill()
                self._fail_waiting(jobs, results, _failed(FailureKind.START, failure))
                return
            self._workers.append(worker)

    def _stuck(self) -> int:
        """Workers that may be started beyond the limit, as many as have been busy for long: forked ones are cheap."""
        if self._template is None:
            return 0
        soon = time.monotonic() + self._deadline_s - LONG_S
        return min(self._limit, sum(worker.job is not None and worker.deadline < soon for worker in self._workers))

    def _wait(self) -> None:
        """Until a worker says something, one is late, or it is time to look whether the pool was closed."""
        first = min((worker.deadline for worker in self._workers if worker.busy), default=0.0)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                for source in worker.sources:
                    selector.register(source, selectors.EVENT_READ)
            selector.select(max(0.0, min(first - time.monotonic(), CLOSE_POLL_S)))

    def _attend(self, worker: _Worker, jobs: deque[_Job], results: dict[int, Result]) -> None:
        """Take in what a worker said; bury it if it is dead or late."""
        outcome = worker.listen()
        if outcome is None:
            return
        if worker.finished and self._fell(worker):
            jobs.extendleft([worker.job] if worker.job else [])
        elif outcome.failure is not None and outcome.failure.kind is FailureKind.START:
            self._fail_waiting(jobs, results, outcome)
        elif worker.job is not None:
            results[worker.job[0]] = outcome
        worker.job = None
        if worker.finished or worker.answered >= self._recycle_after:
            self._drop(worker)

    def _fell(self, worker: _Worker) -> bool:
        """Whether it died with its template, and not of its job. One template a call: a job could kill each."""
        template = worker.template
        if template is None or template.poll() is None or self._fallen not in (None, template):
            return False
        self._fallen = template
        return True

    @staticmethod
    def _fail_waiting(jobs: deque[_Job], results: dict[int, Result], outcome: Result) -> None:
        """What cannot start would not start for the next payload either: do not try again for each."""
        results.update((index, outcome) for index, _ in jobs)
        jobs.clear()

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

    def _kill_all(self) -> None:
        for worker in tuple(self._workers):
            self._drop(worker)
        if self._template is not None:
            self._template.close()


class _Worker:
    """One process and what the parent holds of it: the channel for frames and the pipe of what it prints."""

    def __init__(self, startup_s: float) -> None:
        self.job: _Job | None = None
        self.ready = self.finished = self._buried = False
        self.answered = 0
        self.allowed_s, self.deadline = startup_s, time.monotonic() + startup_s
        self._inbox, self._tail = bytearray(), b""
        self.channel, self._theirs = socket.socketpair()
        self._printed: int | None
        self._printed, self._printing = os.pipe()
        os.set_blocking(self._printed, False)
        self.channel.setblocking(False)
        self.process: subprocess.Popen[bytes] | None = None
        self.template: subprocess.Popen[bytes] | None = None
        """What it was forked from, and dies with."""
        self._group: int | None = None

    def start(self, spec: Mapping[str, JSON], template: WarmTemplate | None, unwanted: Callable[[], bool]) -> str:
        """Start the process; why it could not be, where a template could not. Raises OSError."""
        try:
            if template is not None:
                failure = template.fork([self._theirs.fileno(), self._printing], unwanted)
                self.template = template.process
                self.deadline = time.monotonic() + self.allowed_s
                return failure
            self.process = start(spec, self._theirs, self._printing, template=False)
            self._group = self.process.pid
            return ""
        finally:
            self._theirs.close()
            os.close(self._printing)

    @property
    def busy(self) -> bool:
        """Whether something is awaited from it, so that its deadline counts."""
        return self.job is not None or not self.ready

    @property
    def sources(self) -> list[int]:
        """The file descriptors on which it may say something."""
        return [self.channel.fileno()] + ([] if self._printed is None else [self._printed])

    def send(self, job: _Job, deadline_s: float) -> None:
        """Hand it a job. Raises ConnectionError where it is dead."""
        self.job, self.allowed_s, self.deadline = job, deadline_s, time.monotonic() + deadline_s
        self.channel.settimeout(deadline_s)
        try:
            self.channel.sendall(job[1])
        except TimeoutError:
            pass  # it does not even read: `listen` finds it late
        finally:
            self.channel.setblocking(False)

    def listen(self) -> Result | None:
        """What has become of its job, if anything. `finished` afterwards means: it is of no more use."""
        self._read_printed()
        ended = self._read_channel()
        try:
            frame = take(self._inbox)
        except ValueError:
            return self._end(FailureKind.CRASH, "the worker sent something that is no answer")
        if frame is not None:
            return self._answer(frame)
        if ended:
            self.kill()
            return self._end(FailureKind.CRASH if self.ready else FailureKind.START, self._obituary())
        if self.busy and time.monotonic() >= self.deadline:
            kind, doing = (FailureKind.TIMEOUT, "answer") if self.ready else (FailureKind.START, "start")
            return self._end(kind, f"did not {doing} within {self.allowed_s:g} s and was killed")
        return None

    def kill(self) -> None:
        """End the process and everything in its session, bury it, and release the parent's ends."""
        if self._buried:
            return
        self._buried = True
        if self._group is not None:
            with suppress(ProcessLookupError, PermissionError):  # already dead, in Linux's and macOS's words
                os.killpg(self._group, signal.SIGKILL)  # before it is reaped: until then the number is surely its own
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel; Popen buries it later
                self.process.wait(REAP_S)
        self._read_printed()
        self.channel.close()
        if self._printed is not None:
            os.close(self._printed)
            self._printed = None

    def _answer(self, frame: dict[str, Any]) -> Result | None:
        if "ready" in frame:
            self.ready = True
            self._group = frame.get("pid", self._group)
            return None
        if "unusable" in frame:
            return self._end(FailureKind.START, frame["unusable"])
        self.answered += 1
        if "raised" in frame:
            return _failed(FailureKind.RAISED, frame["raised"])
        return Result(value=frame["value"])

    def _end(self, kind: FailureKind, message: str) -> Result:
        self.finished = True
        return _failed(kind, message)

    def _obituary(self) -> str:
        code = None if self.process is None else self.process.returncode
        how = "died" if code is None else f"exited with code {code}" if code >= 0 else f"was killed by signal {-code}"
        said = self._tail.decode(errors="replace").strip()
        return f"the worker {how}" + (f"; it last printed: {said[-MESSAGE_CHARACTERS // 2 :]}" if said else "")

    def _read_channel(self) -> bool:
        """Read what is there; True at the end of the stream."""
        for _ in range(CHUNKS):
            try:
                chunk = self.channel.recv(CHUNK_BYTES)
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
            if not chunk:
                return True
            self._inbox += chunk
        return False

    def _read_printed(self) -> None:
        """Drain what it printed, so that it never blocks on a full pipe, and keep the end of it."""
        for _ in range(CHUNKS):
            if self._printed is None:
                return
            try:
                chunk = os.read(self._printed, CHUNK_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                os.close(self._printed)
                self._printed = None
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]


def _failed(kind: FailureKind, message: str) -> Result:
    line = " ".join(message.split())[:MESSAGE_CHARACTERS]
    return Result(failure=Failure(kind=kind, message="".join(c if c.isprintable() else "?" for c in line)))
