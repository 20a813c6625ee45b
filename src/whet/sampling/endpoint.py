"""Chat with any OpenAI-compatible endpoint: a teacher, a judge, or a model to evaluate.

Calls are tried again and bounded by deadlines (`calls`); thinking and tool calls are taken out of what comes back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal

import httpx

from whet.errors import ConfigError, SamplerError
from whet.records import Message, Reply, ToolCall
from whet.sampling.base import SamplingParams
from whet.sampling.calls import Call, Caller, FailedCall, Patience, excerpt

THINKING = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)


class EndpointSampler:
    """Text without tokens, by `POST {base_url}/chat/completions`: for judges and writers, never for a gradient.

    `base_url` ends where the API begins (`https://host/v1`); `api_key_env` names the environment variable that holds
    the key, so no key is ever in a recipe. At most `concurrency` requests are under way together, and at most
    `requests_per_minute` begin in a minute, evenly spread; a 429 with a Retry-After holds all of them. An attempt may
    take `request_s` seconds, an answer `total_s`; the first wait between attempts is up to `first_wait_s`.
    `budget_key` is how the endpoint spells the token budget.
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
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint base_url is {base_url!r}; write it in full, like https://host/v1")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ConfigError(f"endpoint {base_url}: the environment variable {api_key_env} is not set; export the key")
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model, self._key_env = model, api_key_env
        self._who = f"endpoint {self._url}, model {model}"
        self._caller = Caller(
            self._who,
            Patience(attempts=attempts, request_s=request_s, total_s=total_s, first_wait_s=first_wait_s),
            concurrency=concurrency,
            per_minute=requests_per_minute,
            headers=self._headers,
            remedy=self._remedy,
        )
        self._budget_key = budget_key

    def replies(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams
    ) -> Generator[tuple[int, Reply], None, None]:
        """The number of each conversation (from 0) with what came of it, as soon as that is known.

        Nothing is raised for one that failed: its reply says why. Closing the generator gives up what is under way.
        Thinking (`reasoning_content`, `reasoning` or a leading `<think>` block) is apart from the content; that of
        earlier turns is not sent.
        """
        count = len(conversations)
        calls = [
            self._call(conversation, params, f"the answer to conversation {number} of {count}")
            for number, conversation in enumerate(conversations, 1)
        ]
        answers = self._caller.each(calls)
        with closing(answers):
            for number, answer in answers:
                if isinstance(answer, FailedCall):
                    yield number, Reply(message=None, failure=str(answer.error), timed_out=answer.timed_out)
                else:
                    yield number, answer

    def _call(self, conversation: Sequence[Message], params: SamplingParams, what: str) -> Call[Reply]:
        if params.stop_ids:
            raise ValueError("stop_ids are tokens, and an endpoint ends its turns itself; leave them out")
        return Call(self._url, self._body(conversation, params), partial(_to_reply, who=self._who), what)

    def _headers(self) -> dict[str, str]:
        return {} if self._key_env is None else {"Authorization": f"Bearer {os.environ[self._key_env]}"}

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
        if params.stop:
            body["stop"] = list(params.stop)
        return body

    def _remedy(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        if self._key_env is None:
            return "; name the environment variable that holds the key: api_key_env"
        return f"; check the key in {self._key_env}"


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


def _to_reply(response: httpx.Response, who: str) -> Reply:
    """The first choice's message, and whether it was cut off.

    Raises `SamplerError` where the answer has not the shape of one.
    """
    answer = response.json()
    try:
        choice = answer["choices"][0]
        given = choice["message"]
        cut_off = choice.get("finish_reason") == "length"
        content = given.get("content") or ""
        thinking = given.get("reasoning_content") or given.get("reasoning")
        calls = tuple(_to_call(call) for call in given.get("tool_calls") or ())
        found = THINKING.match(content)
        if thinking is None and found:
            thinking, content = found[1].strip(), content[found.end() :]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}; it says {excerpt(answer)}"
        raise SamplerError(f"{who}: the answer is no chat completion ({said})") from error
    message = Message(role="assistant", content=content, thinking=thinking, tool_calls=calls)
    return Reply(message=message, cut_off=cut_off)


def _to_call(call: Mapping[str, Any]) -> ToolCall:
    arguments = json.loads(call["function"]["arguments"] or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of the tool call {call['function']['name']!r} are no JSON object")
    return ToolCall(name=call["function"]["name"], arguments=arguments, id=call.get("id") or "")
