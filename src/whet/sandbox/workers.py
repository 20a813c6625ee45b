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

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
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
"""Longest wait for the kernel to reap a killed process."""


@dataclass(slots=True)
class _Call:
    """One call of a pool."""

    jobs: deque[tuple[int, JSON]]
    """What is not begun: the place of a payload, and the payload."""
    results: dict[int, Result] = field(default_factory=dict)
    servers: list[asyncio.Task[None]] = field(default_factory=list)
    fallen: subprocess.Popen[bytes] | None = None
    """The template that died in this call, if one did."""


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
        self._idle: list[Worker] = []
        self._closing = threading.Event()
        self._keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whet-workers")

    def map(self, payloads: Sequence[JSON]) -> list[Result]:
        """One result for each payload, in order; never raises for what a worker does. Callable from any thread."""
        assert not self._closing.is_set(), "the pool is closed"
        return self._keeper.submit(lambda: asyncio.run(self._answers(payloads))).result()

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

    async def _answers(self, payloads: Sequence[JSON]) -> list[Result]:
        call = _Call(deque(enumerate(payloads)))
        for _ in range(min(self._limit, len(payloads))):
            self._serve_too(call)
        while pending := [server for server in call.servers if not server.done()]:
            await asyncio.wait(pending, timeout=CLOSE_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            if self._closing.is_set():
                for server in pending:
                    server.cancel()
        for server in call.servers:
            if not server.cancelled():
                server.result()  # a mistake of ours is raised
        for worker in self._idle[self._limit :]:
            worker.kill()
        del self._idle[self._limit :]
        lost = failed(FailureKind.CRASH, "the pool was closed")
        return [call.results.get(place, lost) for place in range(len(payloads))]

    def _serve_too(self, call: _Call) -> None:
        """One more worker for a call; beyond the limit as many again where others are busy for long (if forked)."""
        if call.jobs and len(call.servers) < 2 * self._limit:
            call.servers.append(asyncio.get_running_loop().create_task(self._serve(call)))

    async def _serve(self, call: _Call) -> None:
        """A worker's part of a call; one that is of no more use is replaced."""
        while call.jobs:
            worker = self._worker(call)
            try:
                while call.jobs and worker.answered < self._recycle_after and not worker.finished:
                    await self._answer(worker, call)
            finally:
                if worker.finished or worker.answered >= self._recycle_after:
                    worker.kill()
                else:
                    self._idle.append(worker)

    def _worker(self, call: _Call) -> Worker:
        """An idle worker, else a new one."""
        while self._idle:
            if not (worker := self._idle.pop()).gone:
                return worker
            worker.kill()
        worker = Worker(self._startup_s)
        if failure := worker.start(self._spec, self._template, self._closing.is_set):
            worker.finished = True
            self._fail_waiting(call, failed(FailureKind.START, failure))
        return worker

    async def _answer(self, worker: Worker, call: _Call) -> None:
        """The result of the next job."""
        job = call.jobs.popleft()
        loop = asyncio.get_running_loop()
        late = None if self._template is None else loop.call_later(LONG_S, self._serve_too, call)
        try:
            result = await worker.ask(job[1], self._deadline_s)
        finally:
            if late is not None:
                late.cancel()
        if worker.finished and self._fell(worker, call):
            call.jobs.appendleft(job)
            return
        call.results[job[0]] = result
        if result.failure is not None and result.failure.kind is FailureKind.START:
            self._fail_waiting(call, result)

    @staticmethod
    def _fail_waiting(call: _Call, result: Result) -> None:
        """What cannot start would not start for the next payload either: do not try again for each."""
        call.results.update((place, result) for place, _ in call.jobs)
        call.jobs.clear()

    @staticmethod
    def _fell(worker: Worker, call: _Call) -> bool:
        """Whether it died with its template, and not of its job. One template a call: a job could kill each."""
        if not worker.orphaned or call.fallen not in (None, worker.template):
            return False
        call.fallen = worker.template
        return True

    def _kill_all(self) -> None:
        for worker in self._idle:
            worker.kill()
        if self._template is not None:
            self._template.close()


class Worker:
    """One process and what the parent holds of it: the channel for frames and the pipe of what it prints."""

    def __init__(self, startup_s: float) -> None:
        self.finished = self._ready = self._buried = False
        """`finished`: it is of no more use."""
        self.answered = 0
        self._startup_s, self._answer_s, self._deadline = startup_s, 0.0, time.monotonic() + startup_s
        self._inbox, self._tail = bytearray(), b""
        self._channel, self._theirs = socket.socketpair()
        self._printed: int | None
        self._printed, self._printing = os.pipe()
        os.set_blocking(self._printed, False)
        self._channel.setblocking(False)
        self._process: subprocess.Popen[bytes] | None = None
        self.template: subprocess.Popen[bytes] | None = None
        """What it was forked from, and dies with."""
        self._group: int | None = None

    def start(self, spec: Mapping[str, JSON], template: WarmTemplate | None, unwanted: Callable[[], bool]) -> str:
        """Start the process; why it could not be, where it could not."""
        try:
            if template is not None:
                failure = template.fork([self._theirs.fileno(), self._printing], unwanted)
                self.template = template.process
                self._deadline = time.monotonic() + self._startup_s
                return failure
            self._process = start(spec, self._theirs, self._printing, template=False)
            self._group = self._process.pid
        except OSError as error:
            return f"no process could be started: {error}"
        finally:
            self._theirs.close()
            os.close(self._printing)
        return ""

    async def ask(self, payload: JSON, deadline_s: float) -> Result:
        """The answer to one payload, or why there is none; its start has a deadline of its own."""
        try:
            asked = encode({"payload": payload})
        except (TypeError, ValueError, RecursionError) as error:
            return failed(FailureKind.RAISED, f"the payload cannot be sent: {error}")
        self.finished, self._answer_s = True, deadline_s  # until it has answered
        if self._ready:
            self._deadline = time.monotonic() + deadline_s
        with suppress(ConnectionError, TimeoutError):  # it is dead, or does not even read: `_frame` finds out
            async with asyncio.timeout(self._deadline - time.monotonic()):
                await asyncio.get_running_loop().sock_sendall(self._channel, asked)
        if isinstance(frame := await self._frame(), Result):
            return frame
        self.finished = False
        self.answered += 1
        return failed(FailureKind.RAISED, frame["raised"]) if "raised" in frame else Result(value=frame["value"])

    @property
    def gone(self) -> bool:
        """Whether its process ended while it was asked nothing."""
        try:
            return self._channel.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def orphaned(self) -> bool:
        """Whether the template that it was forked from died, and it with it."""
        return self.template is not None and self.template.poll() is not None

    def kill(self) -> None:
        """End the process and everything in its session, reap it, and release the parent's ends."""
        if self._buried:
            return
        self._buried = True
        if self._group is not None:
            with suppress(ProcessLookupError, PermissionError):  # already dead, in Linux's and macOS's words
                os.killpg(self._group, signal.SIGKILL)  # before it is reaped: until then the number is surely its own
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel; Popen reaps it later
                self._process.wait(REAP_S)
        self._read_printed()
        self._channel.close()
        if self._printed is not None:
            os.close(self._printed)
            self._printed = None

    async def _frame(self) -> dict[str, Any] | Result:
        """The frame with its answer; or why there will be none."""
        loop = asyncio.get_running_loop()
        while True:
            self._read_printed()
            ended = self._read_channel()
            lost = FailureKind.CRASH if self._ready else FailureKind.START
            try:
                frame = take(self._inbox)
            except ValueError:
                return failed(FailureKind.CRASH, "the worker sent something that is no answer")
            if frame is not None and "unusable" in frame:
                return failed(FailureKind.START, frame["unusable"])
            if frame is not None and "ready" not in frame:
                return frame
            if frame is not None:
                self._ready, self._group = True, frame.get("pid", self._group)
                self._deadline = time.monotonic() + self._answer_s
            elif ended:
                self.kill()
                return failed(lost, self._obituary())
            elif (left := self._deadline - time.monotonic()) > 0:
                await self._stir(loop, left)
            elif self._ready:
                return failed(FailureKind.TIMEOUT, f"did not answer within {self._answer_s:g} s and was killed")
            else:
                return failed(lost, f"did not start within {self._startup_s:g} s and was killed")

    async def _stir(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Until it says or prints something, or the time is over."""
        said, sources = asyncio.Event(), [self._channel.fileno(), *([] if self._printed is None else [self._printed])]
        for source in sources:
            loop.add_reader(source, said.set)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(said.wait(), seconds)
        finally:
            for source in sources:
                loop.remove_reader(source)

    def _obituary(self) -> str:
        code = None if self._process is None else self._process.returncode
        how = "died" if code is None else f"exited with code {code}" if code >= 0 else f"was killed by signal {-code}"
        said = self._tail.decode(errors="replace").strip()
        return f"the worker {how}" + (f"; it last printed: {said[-MESSAGE_CHARACTERS // 2 :]}" if said else "")

    def _read_channel(self) -> bool:
        """Read what is there; True at the end of the stream."""
        for _ in range(CHUNKS):
            try:
                chunk = self._channel.recv(CHUNK_BYTES)
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


def failed(kind: FailureKind, message: str) -> Result:
    """A failure, its message in one printable line."""
    line = " ".join(message.split())[:MESSAGE_CHARACTERS]
    return Result(failure=Failure(kind=kind, message="".join(c if c.isprintable() else "?" for c in line)))
