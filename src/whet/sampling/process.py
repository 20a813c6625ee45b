"""What the driver knows of one sampler process: whether it is well, what it owes, and how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from whet.records import Completion
from whet.sampling.base import Request, settle
from whet.sampling.replica import read_answer, request_frame
from whet.sandbox.base import JSON
from whet.sandbox.frames import encode, take
from whet.sandbox.launch import WarmTemplate, start

STEADY_VERSIONS = 20
"""Hand-overs that one process must outlive for its replica to get all restarts back: few deaths in a long run are no
reason to end it, and a sampler that cannot live dies sooner."""
TAIL_BYTES = 200
"""How much of what replicas printed is told when one has died."""


class ReplicaState(StrEnum):
    """Of a replica; only a healthy one is asked."""

    RESTARTING = "restarting"
    STALE = "stale"
    """It is there and has no weights yet, or is about to take others."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """It owes something and has been silent for long."""
    DEAD = "dead"


class LostReplica(Exception):
    """A replica died while something was asked of it; another one can be asked."""


class Spawner:
    """Starts replicas as copies of a process that has loaded what they need.

    A fork takes milliseconds and shares the memory of what is loaded; a device cannot be held across one.
    """

    def __init__(self, options: Mapping[str, JSON], log: Path, startup_s: float) -> None:
        """`options` are those of `sampling.replica.load`; what they print goes to `log`."""
        spec: dict[str, JSON] = {"target": "whet.sampling.replica:load", "arguments": [], "options": dict(options)}
        spec |= {"memory_mb": None, "talks": True}
        self._template = WarmTemplate(partial(start, spec, printing=subprocess.DEVNULL, template=True), startup_s)
        self._closed = False
        self._log = log
        self._printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def start(self) -> socket.socket:
        """A process that will say that it is ready. Raises `OSError` where there is none."""
        ours, theirs = socket.socketpair()
        with theirs:
            if failure := self._template.fork([theirs.fileno(), self._printed], lambda: self._closed):
                ours.close()
                raise OSError(failure)
        return ours

    def close(self) -> None:
        """End the process that forks, and with it those that it forked; the others were killed."""
        self._closed = True
        self._template.close()
        os.close(self._printed)

    def last_words(self) -> str:
        """The end of what they printed."""
        return self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip() if self._log.is_file() else ""


class Replica:
    """One process after another under one number."""

    def __init__(self, number: int, restarts: int) -> None:
        self.number, self.restarts, self._allowed = number, restarts, restarts
        self.name = f"sampler {number}"
        self.health, self.since, self.version = ReplicaState.RESTARTING, time.monotonic(), -1
        self.gone = False
        """No process of it will be there again."""
        self.obituary = self.owes = ""
        self.owed: dict[int, asyncio.Future[Completion]] = {}
        self.lock = asyncio.Lock()
        self.renewing: asyncio.Future[None] | None = None
        self.pid = 0
        self._first: int | None = None  # version that the process was given first
        self._count = self._most = 0
        self._inbox = bytearray()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._receipt: asyncio.Future[dict[str, Any]] | None = None

    @property
    def can_take_weights(self) -> bool:
        """Whether there is a process that listens."""
        return self._streams is not None and self.health in (
            ReplicaState.STALE,
            ReplicaState.HEALTHY,
            ReplicaState.SUSPECT,
        )

    def describe(self) -> str:
        """`sampler 1 (process 4711) is suspect since 12 s and owes 3 answers`."""
        owes = f" and owes {len(self.owed)} answers" if self.owed else f" and owes {self.owes}" if self.owes else ""
        died = f" ({self.obituary})" if self.obituary else ""
        lasts = f"{time.monotonic() - self.since:.0f} s"
        return f"{self.name} (process {self.pid}) is {self.health} since {lasts}{owes}{died}"

    async def greet(self, channel: socket.socket) -> None:
        """Wait until the process at the other end is ready. Raises `OSError` where it cannot be used."""
        self._inbox.clear()
        self._streams = await asyncio.open_connection(sock=channel, limit=1 << 22)
        while (frame := take(self._inbox)) is None:
            if not (chunk := await self._streams[0].read(1 << 20)):
                raise OSError("its process ended")
            self._inbox += chunk
        if "unusable" in frame:
            raise OSError(frame["unusable"])
        self.pid = frame["pid"]

    async def ask(self, request: Request) -> Completion:
        """The completion. Raises `LostReplica` where the process dies first, `SamplerError` where it has none."""
        self._count += 1
        number, future = self._count, asyncio.Future[Completion]()
        self.owed[number] = future
        self._most = max(self._most, len(self.owed))
        try:
            self._tell(request_frame(number, request))
            return await future
        finally:
            if self.owed.pop(number, None) is not None and self._streams is not None:
                self._tell({"cancel": number})

    async def load(self, path: Path, version: int, digest: str) -> dict[str, Any]:
        """Let it take weights in; returns what it says of them."""
        self._receipt = asyncio.Future()
        self._tell({"load": str(path), "version": version, "digest": digest})
        return await self._receipt

    async def listen(self, request_s: float, changed: Callable[[], None]) -> None:
        """Take in what it says until it dies, by itself or because it has been silent for too long."""
        assert self._streams is not None, "it was greeted"
        while not self.gone:
            try:
                async with asyncio.timeout(request_s / 2):
                    chunk = await self._streams[0].read(1 << 20)
            except TimeoutError:
                if self.owed and self.health is ReplicaState.SUSPECT:
                    self.kill(f"owes {len(self.owed)} answers and was silent for {request_s:g} s")
                    return
                if self.owed and self.health is ReplicaState.HEALTHY:
                    self.be(ReplicaState.SUSPECT)
                continue
            except OSError:
                return
            if not chunk:
                return
            if self.health is ReplicaState.SUSPECT:
                self.be(ReplicaState.HEALTHY)
                changed()
            self._inbox += chunk
            try:
                while (frame := take(self._inbox)) is not None:
                    self._hear(frame)
            except ValueError:
                self.kill("sent something that is no frame")
                return
            if 2 * len(self.owed) <= self._most:  # not at each answer: many may wait
                self._most = len(self.owed)
                changed()

    def kill(self, why: str) -> None:
        """End the process; `listen` returns."""
        self.obituary = self.obituary or why
        if self.pid:
            with suppress(ProcessLookupError):  # dead already, and not yet buried: the number is still its own
                os.kill(self.pid, signal.SIGKILL)

    def bury(self, printed: str) -> None:
        """The process is dead: whatever it owed is lost, and if it may not be started again it is gone."""
        self.obituary = self.obituary or "its process ended" + (f", having printed: {printed}" if printed else "")
        lost = LostReplica(f"{self.name}: {self.obituary}")
        self.be(ReplicaState.DEAD)
        if self._streams is not None:
            self._streams[1].close()
        self._streams, self.pid, self.owes, self._first = None, 0, "", None
        waiting: list[asyncio.Future[Any]] = [*self.owed.values(), *([self._receipt] if self._receipt else [])]
        for future in waiting:
            if not future.done():
                future.set_exception(lost)
        self.owed.clear()
        self.gone, self.restarts = self.restarts == 0, max(0, self.restarts - 1)

    def confirm(self, version: int) -> None:
        """It has the weights of a version, and computes with them as it should."""
        self.version, self.owes = version, ""
        self._first = version if self._first is None else self._first
        if version - self._first >= STEADY_VERSIONS:
            self.restarts = self._allowed
        self.be(ReplicaState.HEALTHY)

    def be(self, health: ReplicaState) -> None:
        """Be in this state from now on."""
        self.health, self.since = health, time.monotonic()

    def _tell(self, frame: Mapping[str, JSON]) -> None:
        if self._streams is None:
            raise LostReplica(f"{self.name}: {self.obituary or 'its process ended'}")
        self._streams[1].write(encode(frame))

    def _hear(self, frame: Mapping[str, Any]) -> None:
        if "done" in frame:
            future = self.owed.pop(frame["done"], None)
            if future is not None:  # else it was cancelled meanwhile
                settle(future, read_answer(frame))
        elif "beat" not in frame and self._receipt is not None and not self._receipt.done():
            self._receipt.set_result(dict(frame))
