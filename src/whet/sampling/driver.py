"""Steps an engine while its answers are awaited, in the event loop of those who await."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from whet.errors import SamplerError
from whet.records import Completion
from whet.sampling.base import Request

T = TypeVar("T")


class Stepper(Protocol[T]):
    """Works on many requests at once, a step at a time. A ticket stands for a request."""

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""

    def submit(self, request: Request) -> T:
        """Take a request in; it starts at a later step."""

    def cancel(self, ticket: T) -> None:
        """Forget a request, waiting or running."""

    def step(self) -> Sequence[tuple[T, Completion | SamplerError]]:
        """Work on all of them; returns those that are done."""

    def clear(self) -> None:
        """Forget every request."""


class Driver(Generic[T]):
    """From `submit` and `step` to `await`. Between two steps all coroutines that can go on do."""

    def __init__(self, name: str, engine: Stepper[T]) -> None:
        """`name` is what messages call the engine."""
        self._name, self._engine = name, engine
        self._awaited: dict[T, asyncio.Future[Completion]] = {}
        self._task: asyncio.Task[None] | None = None

    async def sample(self, request: Request) -> Completion:
        """The completion, or its `SamplerError`; an engine that fails is the error of all that wait for it.

        Cancelling gives the request up. Raises `SamplerError` where the engine is at work in another event loop.
        """
        loop = asyncio.get_running_loop()
        running = self._task is not None and not self._task.done()
        if running and self._task is not None and self._task.get_loop() is not loop:
            raise SamplerError(f"{self._name} is at work in another event loop; await all of its answers in one")
        ticket = self._engine.submit(request)
        future: asyncio.Future[Completion] = loop.create_future()
        self._awaited[ticket] = future
        if not running:
            self._task = loop.create_task(self._drive())
        try:
            return await future
        finally:
            if self._awaited.pop(ticket, None) is not None:
                self._engine.cancel(ticket)

    async def _drive(self) -> None:
        while self._engine.busy:
            asked = -1
            while asked != (asked := len(self._awaited)):  # those who can ask do so first: a larger batch
                await asyncio.sleep(0)
            try:
                for ticket, answer in self._engine.step():
                    settle(self._awaited.pop(ticket), answer)
            except Exception as error:  # noqa: BLE001 - whatever it was, nothing may be awaited for ever
                self._fail(error)
                return
            except BaseException as error:
                self._fail(error)
                raise

    def _fail(self, error: BaseException) -> None:
        """None of the requests gets an answer. The next one finds an engine without any."""
        awaited, self._awaited = self._awaited, {}
        for future in awaited.values():
            failure = SamplerError(f"{self._name} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            settle(future, failure)
        with suppress(Exception):  # an engine that is gone cannot forget; what failed is said already
            self._engine.clear()


def settle(future: asyncio.Future[Completion], answer: Completion | SamplerError) -> None:
    """Wake the request, unless it was cancelled and only its task does not know yet."""
    if future.done():
        return
    if isinstance(answer, SamplerError):
        future.set_exception(answer)
    else:
        future.set_result(answer)
