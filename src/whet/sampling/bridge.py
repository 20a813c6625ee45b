"""Between plain functions and asynchronous ones, with or without an event loop that is running already.

`run`, `LoopThread` and `aside` cross from one to the other; `Driver` steps an engine while its answers are awaited, in
the event loop of the tasks that await.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from whet.errors import SamplerError
from whet.records import Completion
from whet.sampling.base import Request, TokenSampler

T = TypeVar("T")

_local = threading.local()


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`.

    It runs in this thread's own event loop, which lives as long as the thread. Where one is running already (a
    notebook, a server), it runs in another thread, and this one waits: what can await should await instead.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(work)
    thread = LoopThread("whet-loop")  # one of its own: work may call `run` itself
    try:
        return thread.begin(work).result()
    finally:
        thread.close()


class LoopThread:
    """An event loop in a thread of its own, for what goes on while the other threads compute."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with suppress(KeyboardInterrupt, SystemExit):  # of a task: the future that stands for it has it
                self.loop.run_forever()
                return

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it there. Cancelling the future gives it up."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Give up what goes on, and end the thread."""
        self.begin(_cancel_all()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all of them, in order. Where one raises, the others are cancelled before that goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def aside(function: Callable[[], T]) -> T:
    """The result of `function`, which blocks, from a thread of its own.

    Not `asyncio.to_thread`: the interpreter does not end before that one's threads do, and who is asked to stop at
    once does not wait for a silent judge.
    """
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()  # who gives up leaves it running, and its result goes nowhere

    def work() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:  # noqa: BLE001  raised where it is awaited
            answer.set_exception(error)

    threading.Thread(target=work, name="whet-aside", daemon=True).start()
    return await asyncio.wrap_future(answer)


async def sample_all(sampler: TokenSampler, requests: Sequence[Request]) -> list[Completion | SamplerError]:
    """The completion of each request, or its error, in order."""

    async def one(request: Request) -> Completion | SamplerError:
        try:
            return await sampler.sample(request)
        except SamplerError as error:
            return error

    return await together(one(request) for request in requests)


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


def _run_here(work: Coroutine[Any, Any, T]) -> T:
    loop = getattr(_local, "loop", None)
    if loop is None:
        loop = _local.loop = asyncio.new_event_loop()
    try:
        result: T = loop.run_until_complete(work)
    except BaseException:
        loop.run_until_complete(_cancel_all())
        raise
    return result


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
