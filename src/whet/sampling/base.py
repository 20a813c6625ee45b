"""The sampling door: tokens with their log-probabilities, which a policy gradient needs.

`run`, `LoopThread` and `aside` cross between plain functions and asynchronous ones, with or without an event loop that
is running already; `Driver` steps an engine while its answers are awaited, in the event loop of the tasks that await.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from whet.errors import SamplerError
from whet.records import Completion

T = TypeVar("T")

_local = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion."""

    max_tokens: int
    """Most tokens, the stop token included."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    """Strings that end the completion with the token that completes one of them."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}; use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}; leave it out for no limit")
        if not all(self.stop):
            raise ValueError("stop must hold no empty string, which would end every completion at once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. It alone decides what is sampled, whatever other requests there are."""

    prompt: Sequence[int] | np.ndarray
    seed: int
    """Decides its random numbers."""
    params: SamplingParams
    samples: int = 1
    """How many requests of this prompt belong together: whether keeping the prompt apart from its answers pays."""
    heard: Callable[[list[int]], None] | None = field(default=None, compare=False)
    """Told after each step which tokens are written so far, by a sampler that can; it must not raise."""
    goes_on: bool = False
    """Whether a later prompt is likely to begin with this one: what is computed of it may be kept until then."""
    version: int | None = None
    """Of the weights that it is to be sampled with, where the sampler keeps older ones; None: the newest."""


class TokenSampler(Protocol):
    """Samples tokens with their log-probabilities under the weights of a known version."""

    @property
    def version(self) -> int:
        """How many weight hand-overs it has seen."""

    async def sample(self, request: Request) -> Completion:
        """The completion; `SamplerError` where there is none, for this request alone.

        Any number of requests may be awaited together: those that wait are batched, and equal prompts computed once.
        Cancelling the awaiting task gives the request up and frees its place.
        """


class PolicySampler(TokenSampler, Protocol):
    """A token sampler over the weights that a trainer hands over."""

    def publish(self, version: int) -> None:
        """Sample with the trainer's weights as they are now, under this version. No request may be running."""


class ApartSampler(PolicySampler, Protocol):
    """A policy sampler with a copy of the weights: it goes on while the trainer changes its own."""

    @property
    def gaps(self) -> Mapping[int, float]:
        """Mean |log-probability difference| from the trainer on a probe of each version that was handed over; nats."""

    def describe(self) -> str:
        """Who owes what since when, for an error."""

    def save(self, folder: Path) -> None:
        """The past versions that requests may still name."""

    def load(self, folder: Path) -> None:
        """Have the versions that `save` kept."""

    def close(self) -> None:
        """End what it has started."""


# --------------------------------------------------------------------------------------- awaiting


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

    version: int
    """Of the weights."""

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
        self._name, self.engine = name, engine
        self._awaited: dict[T, asyncio.Future[Completion]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.engine.version

    def publish(self, version: int) -> None:
        """Take note that the engine's weights are now of this version. `SamplerError` while requests are running."""
        if self.engine.busy:
            raise SamplerError(f"weights of version {version} were published while requests are running; await them")
        self.engine.clear()
        self.engine.version = version

    async def sample(self, request: Request) -> Completion:
        """The completion, or its `SamplerError`; an engine that fails is the error of all that wait for it.

        Cancelling gives the request up. Raises `SamplerError` where the engine is at work in another event loop.
        """
        loop = asyncio.get_running_loop()
        running = self._task is not None and not self._task.done()
        if running and self._task is not None and self._task.get_loop() is not loop:
            raise SamplerError(f"{self._name} is at work in another event loop; await all of its answers in one")
        ticket = self.engine.submit(request)
        future: asyncio.Future[Completion] = loop.create_future()
        self._awaited[ticket] = future
        if not running:
            self._task = loop.create_task(self._drive())
        try:
            return await future
        finally:
            if self._awaited.pop(ticket, None) is not None:
                self.engine.cancel(ticket)

    async def _drive(self) -> None:
        while self.engine.busy:
            asked = -1
            while asked != (asked := len(self._awaited)):  # those who can ask do so first: a larger batch
                await asyncio.sleep(0)
            try:
                for ticket, answer in self.engine.step():
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
            self.engine.clear()


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
