"""From plain functions to the asynchronous ones, with or without an event loop that is running already."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

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
    with ThreadPoolExecutor(1, "whet-loop") as thread:  # one of its own: work may call `run` itself
        beside = _Beside(work)
        try:
            return thread.submit(beside.run).result()
        except BaseException:
            beside.cancel()
            raise


class LoopThread:
    """An event loop in a thread of its own, for what goes on while the other threads compute."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

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


class _Beside(Generic[T]):
    """Work in an event loop of another thread, which can be told to give it up."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work, self._loop = work, asyncio.new_event_loop()

    def run(self) -> T:
        try:
            return self._loop.run_until_complete(self._work)
        finally:
            self._loop.run_until_complete(_cancel_all())
            self._loop.close()

    def cancel(self) -> None:
        def each() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

        with suppress(RuntimeError):  # closed: it is over
            self._loop.call_soon_threadsafe(each)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
