"""Chat with any OpenAI-compatible endpoint: a teacher, a judge, or a model to evaluate.

What a busy or restarting server does (429, 5xx, refused and broken connections, half an answer, silence) is tried
again, each time later, with jitter so that many clients do not come back together. What will not get better (a wrong
key, an unknown model, an answer of the wrong shape) is raised at once. Two deadlines bound every wait: one for each
attempt, one for the whole call.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import Any, Literal, TypeVar

import httpx

from whet.errors import ConfigError, SamplerError
from whet.records import Message, Reply, ToolCall
from whet.sampling.base import SamplingParams

T = TypeVar("T")

LONGEST_WAIT_S = 30.0
"""The wait between two attempts doubles up to this; a server's Retry-After may ask for more."""
LOOK_S = 1.0
"""How often somebody who waits for replies looks whether they can still come."""
EXCERPT_CHARACTERS = 300
"""How much of a server's own words a message quotes."""
THINKING = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)


class EndpointSampler:
    """`ChatSampler` over `POST {base_url}/chat/completions`.

    `base_url` ends where the API begins (`https://host/v1`); `api_key_env` names the environment variable that holds
    the key, so no key is ever in a recipe. At most `concurrency` requests are under way together, and at most
    `requests_per_minute` begin in a minute, evenly spread; a 429 with a Retry-After holds all of them. An attempt may
    take `request_s` seconds, a call of `chat` `total_s`; the first wait between attempts is up to `first_wait_s`.
    `budget_key` is how the endpoint spells the token budget; `extra` is added to every request's body.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        attempts: int = 6,
        request_s: float = 120.0,
        total_s: float = 1800.0,
        first_wait_s: float = 1.0,
        budget_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint base_url is {base_url!r}; write it in full, like https://host/v1")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ConfigError(f"endpoint {base_url}: the environment variable {api_key_env} is not set; export the key")
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model, self._key_env = model, api_key_env
        self._concurrency, self._attempts = concurrency, attempts
        self._request_s, self._total_s, self._first_wait_s = request_s, total_s, first_wait_s
        self._pace = _Pace(requests_per_minute)
        self._budget_key, self._extra = budget_key, dict(extra or {})

    def chat(self, conversations: Sequence[Sequence[Message]], params: SamplingParams) -> list[Message]:
        """One assistant message for each conversation, in order.

        Thinking (`reasoning_content`, `reasoning` or a leading `<think>` block) is apart from the content; that of
        earlier turns is not sent. Raises `SamplerError` for the first conversation without an answer; the other
        requests are then given up. May be called from inside an event loop.
        """
        answers: dict[int, Message] = {}
        with closing(self.replies(conversations, params)) as replies:
            for number, reply in replies:
                if reply.message is None:
                    raise SamplerError(reply.failure)
                answers[number] = reply.message
        return [answers[number] for number in range(len(conversations))]

    def replies(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams
    ) -> Generator[tuple[int, Reply], None, None]:
        """The number of each conversation (from 0) with what came of it, as soon as that is known.

        Nothing is raised for one that failed: its reply says why. Closing the generator gives up what is under way.
        """
        if params.stop_ids:
            raise ValueError("stop_ids are tokens, and an endpoint ends its turns itself; leave them out")
        arrived: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()
        with _running(self._ask_all(conversations, params, lambda *reply: arrived.put(reply))) as work:
            for _ in conversations:
                yield _next_of(arrived, work)

    async def _ask_all(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams,
        tell: Callable[[int, Reply], None],
    ) -> None:
        headers = {} if self._key_env is None else {"Authorization": f"Bearer {os.environ[self._key_env]}"}
        gate = asyncio.Semaphore(self._concurrency)
        limits = httpx.Limits(max_connections=self._concurrency)
        began = time.monotonic()
        async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:

            async def one(number: int, conversation: Sequence[Message]) -> None:
                what = f"the answer to conversation {number + 1} of {len(conversations)}"
                wait = _Wait(f"endpoint {self._url}, model {self._model}", what, began, self._total_s)
                try:
                    async with asyncio.timeout(wait.left_s()), gate:
                        message = await self._answer(client, self._body(conversation, params), wait)
                    tell(number, Reply(message=message))
                except TimeoutError:
                    tell(number, Reply(message=None, failure=str(wait.over()), timed_out=True))
                except SamplerError as error:
                    tell(number, Reply(message=None, failure=str(error), timed_out=wait.timed_out))

            await asyncio.gather(*(one(i, c) for i, c in enumerate(conversations)))

    async def _answer(self, client: httpx.AsyncClient, body: Mapping[str, Any], wait: _Wait) -> Message:
        for attempt in range(1, self._attempts + 1):
            asked_s = 0.0
            try:
                await self._pace.turn()
                async with asyncio.timeout(self._request_s):
                    response = await client.post(self._url, json=body)
                if response.status_code == 200:
                    return _to_message(response.json(), wait.who)
                wait.note(attempt, _status(response))
                if response.status_code != 429 and response.status_code < 500:
                    raise SamplerError(f"{wait.who}: {_status(response)}{self._remedy(response.status_code)}")
                asked_s = _retry_after_s(response)
                if response.status_code == 429:
                    self._pace.hold(asked_s)
            except TimeoutError:
                wait.note(attempt, f"no complete answer within {self._request_s:g} s", timed_out=True)
            except (httpx.RequestError, json.JSONDecodeError, UnicodeDecodeError) as error:
                wait.note(attempt, f"{type(error).__name__}: {error}")
            pause_s = max(
                asked_s, random.uniform(0.5, 1) * min(LONGEST_WAIT_S, self._first_wait_s * 2 ** (attempt - 1))
            )
            if attempt < self._attempts:
                if pause_s >= wait.left_s():
                    raise wait.over(f"the next attempt would be in {pause_s:.1f} s")
                await asyncio.sleep(pause_s)
        raise wait.over("no attempt is left")

    def _body(self, conversation: Sequence[Message], params: SamplingParams) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": [_from_message(message) for message in conversation],
            self._budget_key: params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        if params.top_k is not None:  # no part of OpenAI's own API, which says so; vLLM, SGLang and llama.cpp have it
            body["top_k"] = params.top_k
        return {**body, **self._extra}

    def _remedy(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        if self._key_env is None:
            return "; name the environment variable that holds the key: api_key_env"
        return f"; check the key in {self._key_env}"


class _Pace:
    """Requests that begin evenly spread over time, and not at all while the server asks everybody to wait."""

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

    def over(self, why: str = "the deadline is over") -> SamplerError:
        """The error that says all of it."""
        waited_s = time.monotonic() - self._began
        return SamplerError(
            f"{self.who}: {self._what} has been awaited for {waited_s:.1f} s (deadline {self._total_s:g} s); "
            f"{self._last}; {why}"
        )


# ------------------------------------------------------------------------------- messages, there and back


def _from_message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _to_message(answer: Any, who: str) -> Message:
    """The first choice's message. Raises `SamplerError` where the answer has not the shape of one."""
    try:
        given = answer["choices"][0]["message"]
        content = given.get("content") or ""
        thinking = given.get("reasoning_content") or given.get("reasoning")
        calls = tuple(_to_call(call) for call in given.get("tool_calls") or ())
        found = THINKING.match(content)
        if thinking is None and found:
            thinking, content = found[1].strip(), content[found.end() :]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}; it says {json.dumps(answer)[:EXCERPT_CHARACTERS]}"
        raise SamplerError(f"{who}: the answer is no chat completion ({said})") from error
    return Message(role="assistant", content=content, thinking=thinking, tool_calls=calls)


def _to_call(call: Mapping[str, Any]) -> ToolCall:
    arguments = json.loads(call["function"]["arguments"] or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of the tool call {call['function']['name']!r} are no JSON object")
    return ToolCall(name=call["function"]["name"], arguments=arguments, id=call.get("id") or "")


# ------------------------------------------------------------------------------------------------- HTTP


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


@contextmanager
def _running(work: Coroutine[Any, Any, T]) -> Iterator[Future[T]]:
    """`work` at work in an event loop in a thread of its own; at the end of the block what is left is cancelled."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="whet-endpoint", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(work, loop)
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _next_of(arrived: queue.SimpleQueue[tuple[int, Reply]], work: Future[None]) -> tuple[int, Reply]:
    """The next reply. Where the work itself failed, which is our bug, that is raised instead of waiting for ever."""
    while True:
        try:
            return arrived.get(timeout=LOOK_S)
        except queue.Empty:
            if work.done() and arrived.empty():
                work.result()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
