"""The embedded sampler: the engine in this process, stepped while anybody awaits an answer."""

from __future__ import annotations

import asyncio

from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import Request
from whet.sampling.engine import Engine, Ticket


class EmbeddedSampler:
    """`TokenSampler` over a model in this process, whose weights are the trainer's: there is no copy to hand over.

    The engine takes its steps in the event loop of those who await, and lets them go on between two steps.
    """

    def __init__(self, model: LanguageModel, *, max_running: int = 256, cache_gib: float = 4.0) -> None:
        """At most so many rows side by side, and no more than whose keys and values fit; one always runs."""
        self.model = model
        self.engine = Engine(model, max_running=max_running, cache_bytes=int(cache_gib * 2**30))
        self._awaited: dict[Ticket, asyncio.Future[Completion]] = {}
        self._driver: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.engine.version

    def publish(self, version: int) -> None:
        """Take note that the shared weights are now of this version; nobody may be in the middle of an answer."""
        if self.engine.busy:
            raise SamplerError(f"weights of version {version} were published while requests are running; await them")
        self.engine.version = version

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`."""
        loop = asyncio.get_running_loop()
        if self._driver is not None and not self._driver.done() and self._driver.get_loop() is not loop:
            raise SamplerError("the engine is at work in another event loop; await all its answers in one")
        ticket = self.engine.submit(request)
        future = self._awaited[ticket] = loop.create_future()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        try:
            return await future
        finally:
            if self._awaited.pop(ticket, None) is not None:  # given up by whoever awaited it
                self.engine.cancel(ticket)

    async def _drive(self) -> None:
        """Step while there is something to do. Whoever can go on does so first, and may ask for more."""
        while self.engine.busy:
            waiting = -1
            while waiting != (waiting := len(self._awaited)):
                await asyncio.sleep(0)
            try:
                done = self.engine.step()
            except Exception as error:  # noqa: BLE001 - whatever it was, nobody may be left waiting
                self._fail(SamplerError(f"the sampling engine failed: {type(error).__name__}: {error}"), error)
                return
            for ticket, answer in done:
                future = self._awaited.pop(ticket)
                if isinstance(answer, SamplerError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _fail(self, failure: SamplerError, cause: Exception) -> None:
        """Nobody gets an answer any more. The next request finds a new engine."""
        failure.__cause__ = cause
        self.engine.clear()
        for future in self._awaited.values():
            future.set_exception(failure)
        self._awaited.clear()
