"""Forked processes that are asked more than once: one for each episode of an environment, never used again.

A template process loads the code once; a session is a fork of it with memory of its own, which ends with the episode,
or is killed alone at the deadline of a question. Sessions are awaited: none holds up another.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

from whet.sandbox.base import JSON, Failure, FailureKind, Result
from whet.sandbox.launch import WarmTemplate, start
from whet.sandbox.workers import Worker, failed

STARTUP_S = 120.0
"""For starting and importing: a slow disk is no failure."""


class Session(Worker):
    """One process. Its questions are answered in order; after a failure that is not RAISED it is dead."""

    def __init__(self, startup_s: float, gate: asyncio.Semaphore) -> None:
        super().__init__(startup_s)
        self._gate, self._closed = gate, False
        self.answered_s = 0.0
        """Seconds that the last answer took."""

    async def ask(self, payload: JSON, deadline_s: float) -> Result:
        """The answer to one payload, or why there is none; a session that was late is killed."""
        if self._closed:
            return failed(FailureKind.CRASH, "the session is closed")
        began = time.monotonic()
        result = await super().ask(payload, deadline_s)
        self.answered_s = time.monotonic() - began
        if self.finished:
            self.close()
        return result

    def close(self) -> None:
        """Kill the process, with all that it started. May be called twice."""
        if not self._closed:
            self._closed = True
            self.kill()
            self._gate.release()


class Sessions:
    """Up to `most` sessions at once over one template; `target` and `arguments` are those of a `WorkerPool`.

    `python`: the interpreter of another environment that they are of; None: this one. Their memory has no limit, since
    what they import may reserve any address space.
    """

    def __init__(self, target: str, *, arguments: Sequence[JSON], most: int, python: Path | None) -> None:
        spec: dict[str, JSON] = {"target": target, "arguments": list(arguments), "memory_mb": None}
        begin = partial(start, spec, printing=subprocess.DEVNULL, template=True, python=str(python or ""))
        self._template, self._most = WarmTemplate(begin, STARTUP_S), most
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._closed = False
        # One thread for its whole life: on Linux a process dies with the thread that started it.
        self._keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whet-sessions")

    async def open(self) -> Session | Failure:
        """A new session, as soon as there is a place; or why no process could be started."""
        loop = asyncio.get_running_loop()
        gate = self._gates.setdefault(loop, asyncio.Semaphore(self._most))
        await gate.acquire()
        session = Session(STARTUP_S, gate)
        try:
            failure = await loop.run_in_executor(self._keeper, session.start, {}, self._template, lambda: self._closed)
        except BaseException:
            session.close()
            raise
        if failure:
            session.close()
            return Failure(kind=FailureKind.START, message=failure)
        return session

    def once(self, payload: JSON, deadline_s: float) -> Result:
        """The answer of a session of its own, for callers outside an event loop."""

        async def ask() -> Result:
            session = await self.open()
            if isinstance(session, Failure):
                return Result(failure=session)
            try:
                return await session.ask(payload, deadline_s)
            finally:
                session.close()

        with ThreadPoolExecutor(max_workers=1) as beside:  # there may be an event loop in this thread
            return beside.submit(asyncio.run, ask()).result()

    def close(self) -> None:
        """End the template, and with it all sessions. May be called twice."""
        if not self._closed:
            self._closed = True
            self._keeper.submit(self._template.close).result()
            self._keeper.shutdown()
