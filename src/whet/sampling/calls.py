"""JSON calls over HTTP that are tried again: what an endpoint and a vLLM server have in common.

What a busy or restarting server does (429, 5xx, refused and broken connections, half an answer, silence) is tried
again, each time later, with jitter so that many clients do not come back together. What will not get better (a wrong
key, an unknown model, an answer of the wrong shape) ends a call at once. Two deadlines bound every wait: one for each
attempt, one for all calls that were asked for together. Not every call has to find out for itself that a server has
fallen silent: after `SILENT` in a row without an answer the others are given up.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import queue
import random
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, Literal, TypeVar

import httpx

from whet.errors import SamplerError
from whet.sampling.base import LoopThread

T = TypeVar("T")

LONGEST_WAIT_S = 30.0
"""The wait between two attempts doubles up to this; a server's Retry-After may ask for more."""
LOOK_S = 1.0
"""How often a waiting caller checks whether answers can still come."""
SILENT = 16
"""Calls in a row that had no answer in all their attempts, after which those that wait are not made."""
EXCERPT_CHARACTERS = 300
"""How much of a server's own words a message quotes."""
_tls = cache(httpx.create_ssl_context)
"""One for all clients: the certificates take some 30 ms to read, and a client lives as long as calls are under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Retries and deadlines of a call."""

    attempts: int = 6
    request_s: float = 120.0
    """Longest time of one attempt."""
    total_s: float = 1800.0
    """Longest time of all calls that are asked for together."""
    first_wait_s: float = 1.0
    """Longest wait after the first attempt."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its answer is read: `read` raises `SamplerError` where it has the wrong shape.

    An answer that is no JSON, where `read` asks for it, counts as one that broke off.
    """

    url: str
    body: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    """What is sent, or what makes it when it is sent."""
    read: Callable[[httpx.Response], T]
    what: str
    """What is awaited, for messages."""
    method: Literal["POST", "GET"] = "POST"
    attempts: int | None = None
    """Other than the caller's: 1 for what must not be done twice."""


@dataclass(frozen=True, slots=True)
class FailedCall:
    """Why a call has no answer. No `read` may return one."""

    error: SamplerError
    timed_out: bool


@dataclass(slots=True)
class _Line:
    """What calls that are under way together share."""

    client: httpx.AsyncClient
    gate: asyncio.Semaphore
    silent: list[FailedCall] = field(default_factory=list)
    """The calls that had no answer since the last one that had."""
    users: int = 0


class Caller:
    """Asks a server. At most `concurrency` calls are under way together, and at most `per_minute` begin in a minute,
    evenly spread; a 429 with a Retry-After holds all of them. `remedy` adds to a final status what to do about it."""

    def __init__(
        self,
        who: str,
        patience: Patience,
        *,
        concurrency: int,
        per_minute: float | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
        remedy: Callable[[int], str] = lambda _: "",
    ) -> None:
        self._who, self._patience, self._concurrency = who, patience, concurrency
        self._pace = _Pace(per_minute)
        self._headers, self._remedy = headers, remedy
        self._lines: dict[asyncio.AbstractEventLoop, _Line] = {}

    def each(self, calls: Sequence[Call[T]]) -> Generator[tuple[int, T | FailedCall], None, None]:
        """The number of each call (from 0) with what came of it, as soon as that is known.

        Nothing is raised for one that failed. Closing the generator gives up what is under way. May be used from
        inside an event loop.
        """
        arrived: queue.SimpleQueue[tuple[int, T | FailedCall]] = queue.SimpleQueue()
        with closing(LoopThread("whet-calls")) as thread:
            work = thread.begin(self._ask_all(calls, lambda number, answer: arrived.put((number, answer))))
            for _ in calls:
                yield _next_of(arrived, work)

    def one(self, call: Call[T]) -> T:
        """The answer to one call; raises its `SamplerError`."""
        ((_, answer),) = self.each([call])
        if isinstance(answer, FailedCall):
            raise answer.error
        return answer

    async def ask(self, call: Call[T]) -> T:
        """The answer to one call, in the running event loop; raises its `SamplerError`.

        Calls that are awaited together in a loop share their connections and the limits.
        """
        async with self._line() as line:
            answer = await self._outcome(call, line)
        if isinstance(answer, FailedCall):
            raise answer.error
        return answer

    async def _ask_all(self, calls: Sequence[Call[T]], tell: Callable[[int, T | FailedCall], None]) -> None:
        async with self._line() as line:

            async def one(number: int, call: Call[T]) -> None:
                answer = await self._outcome(call, line)
                tell(number, answer)

            await asyncio.gather(*(one(number, call) for number, call in enumerate(calls)))

    @asynccontextmanager
    async def _line(self) -> AsyncIterator[_Line]:
        """What the calls of this event loop have in common, as long as one of them is under way."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            limits = httpx.Limits(max_connections=self._concurrency)
            client = httpx.AsyncClient(verify=_tls(), headers=self._headers(), timeout=None, limits=limits)
            self._lines[loop] = _Line(client, asyncio.Semaphore(self._concurrency))
        line = self._lines[loop]
        line.users += 1
        try:
            yield line
        finally:
            line.users -= 1
            if not line.users:
                del self._lines[loop]
                await line.client.aclose()

    async def _outcome(self, call: Call[T], line: _Line) -> T | FailedCall:
        wait = _Wait(self._who, call.what, time.monotonic(), self._patience.total_s)
        try:
            async with asyncio.timeout(wait.left_s()), line.gate:
                if len(line.silent) >= SILENT:
                    return _given_up(call.what, line.silent)
                answer = await self._answer(line.client, call, wait)
            line.silent.clear()
        except TimeoutError:
            return FailedCall(wait.over(), timed_out=True)
        except Unanswered as error:
            line.silent.append(FailedCall(error, timed_out=wait.timed_out))
            return line.silent[-1]
        except SamplerError as error:  # an answer all the same, and the last one
            line.silent.clear()
            return FailedCall(error, timed_out=False)
        return answer

    async def _answer(self, client: httpx.AsyncClient, call: Call[T], wait: _Wait) -> T:
        patience = self._patience
        most = call.attempts or patience.attempts
        for attempt in range(1, most + 1):
            asked_s = 0.0
            try:
                await self._pace.turn()
                async with asyncio.timeout(patience.request_s):
                    body = None if call.method == "GET" else call.body() if callable(call.body) else call.body
                    response = await client.request(call.method, call.url, json=body)
                if response.status_code == 200:
                    return call.read(response)
                wait.note(attempt, _status(response))
                if response.status_code != 429 and response.status_code < 500:
                    said = f"{wait.who}: {_status(response)}{self._remedy(response.status_code)}"
                    raise NotFound(said) if response.status_code == 404 else SamplerError(said)
                asked_s = _retry_after_s(response)
                if response.status_code == 429:
                    self._pace.hold(asked_s)
            except httpx.InvalidURL as error:
                raise SamplerError(f"{wait.who}: {call.url} is no address: {error}") from error
            except TimeoutError:
                wait.note(attempt, f"no complete answer within {patience.request_s:g} s", timed_out=True)
            except (httpx.RequestError, json.JSONDecodeError, UnicodeDecodeError) as error:
                wait.note(attempt, f"{type(error).__name__}: {error}")
            longest_s = min(LONGEST_WAIT_S, patience.first_wait_s * 2 ** (attempt - 1))
            pause_s = max(asked_s, random.uniform(0.5, 1) * longest_s)
            if attempt < most:
                if pause_s >= wait.left_s():
                    raise wait.over(f"the next attempt would be in {pause_s:.1f} s")
                await asyncio.sleep(pause_s)
        raise wait.over("no attempt is left")


def excerpt(answer: Any) -> str:
    """The beginning of an answer, for a message."""
    return json.dumps(answer)[:EXCERPT_CHARACTERS]


class NotFound(SamplerError):
    """The server has no such thing: it answered 404."""


class Unanswered(SamplerError):
    """No attempt at a call brought an answer."""


def _given_up(what: str, silent: Sequence[FailedCall]) -> FailedCall:
    last = silent[-1]
    said = f"{what} was not asked for, because {len(silent)} calls in a row had no answer; the last: {last.error}"
    return FailedCall(Unanswered(said), timed_out=last.timed_out)


class _Pace:
    """Requests that begin evenly spread over time, and not at all while the server asks its clients to wait."""

    def __init__(self, per_minute: float | None) -> None:
        self._apart_s = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0

    async def turn(self) -> None:
        """Wait until one more request may begin."""
        now = time.monotonic()
        begins = max(now, self._next)
        self._next = begins + self._apart_s
        await asyncio.sleep(begins - now)

    def hold(self, seconds: float) -> None:
        """Let no request begin for so long."""
        self._next = max(self._next, time.monotonic() + seconds)


class _Wait:
    """Who owes what since when, and what came instead."""

    def __init__(self, who: str, what: str, began: float, total_s: float) -> None:
        self.who, self._what, self._began, self._total_s = who, what, began, total_s
        self._last = "no attempt has ended"
        self.timed_out = False
        """Whether the last attempt ended at a deadline, ours or the call's."""

    def left_s(self) -> float:
        """Seconds until the deadline of the call; below 0 when it is over."""
        return self._began + self._total_s - time.monotonic()

    def note(self, attempt: int, happened: str, *, timed_out: bool = False) -> None:
        """Remember what the last attempt brought."""
        self.timed_out = timed_out
        self._last = f"attempt {attempt}: {happened}"

    def over(self, why: str = "the deadline is over") -> Unanswered:
        """The error that says all of it."""
        waited_s = time.monotonic() - self._began
        return Unanswered(
            f"{self.who}: {self._what} has been awaited for {waited_s:.1f} s (deadline {self._total_s:g} s); "
            f"{self._last}; {why}"
        )


def _status(response: httpx.Response) -> str:
    """`503 Service Unavailable`, and the beginning of what the server says about it, on one line."""
    said = " ".join(response.text.split())[:EXCERPT_CHARACTERS]
    return f"{response.status_code} {response.reason_phrase}" + (f" ({said})" if said else "")


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number or a date (RFC 9110, 10.2.3); 0 where it does not ask."""
    asked = response.headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return 0.0


def _next_of(arrived: queue.SimpleQueue[T], work: Future[None]) -> T:
    """The next answer. Where the work itself failed, which is our bug, that is raised instead of waiting for ever."""
    while True:
        try:
            return arrived.get(timeout=LOOK_S)
        except queue.Empty:
            if work.done() and arrived.empty():
                work.result()
