"""Answers as OpenAI writes them: one object, or server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from whet.records import ToolCall
from whet.serving.base import ChatAnswer, ChatChoice

DONE = "data: [DONE]\n\n"


def completion(about: Mapping[str, Any], answer: ChatAnswer) -> dict[str, Any]:
    """The whole answer; `about` is its id, when it was made and by which model."""
    choices = []
    for index, choice in enumerate(answer.choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.content}
        if choice.calls:
            message |= {"content": choice.content or None, "tool_calls": [_call(call) for call in choice.calls]}
        choices.append(
            {"index": index, "message": message, "logprobs": _logprobs(choice), "finish_reason": _ending(choice)}
        )
    return {**about, "object": "chat.completion", "choices": choices, "usage": _usage(answer)}


class Stream:
    """The events of one answer, which know what they have said."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._about = {**about, "object": "chat.completion.chunk"}
        self._said: dict[int, str] = {}

    def text(self, index: int, text: str) -> str:
        """More text of a choice."""
        opening = {} if index in self._said else {"role": "assistant"}
        self._said[index] = self._said.get(index, "") + text
        return self._event(index, {**opening, "content": text})

    def end(self, answer: ChatAnswer, *, usage: bool) -> Iterator[str]:
        """What is left of every choice, and its ending."""
        for index, choice in enumerate(answer.choices):
            left = choice.content[len(self._said.get(index, "")) :]
            if left or index not in self._said:
                yield self.text(index, left)
            if choice.calls:
                yield self._event(index, {"tool_calls": [{"index": n, **_call(c)} for n, c in enumerate(choice.calls)]})
            yield self._event(index, {}, _ending(choice), _logprobs(choice))
        if usage:
            yield event({**self._about, "choices": [], "usage": _usage(answer)})

    def _event(self, index: int, delta: Mapping[str, Any], ending: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ending}
        return event({**self._about, "choices": [choice]})


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _ending(choice: ChatChoice) -> str:
    return "length" if choice.cut_off else "tool_calls" if choice.calls else "stop"


def _logprobs(choice: ChatChoice) -> dict[str, Any] | None:
    if choice.tokens is None:
        return None
    listed = [
        # A token that is a part of a character has no bytes that its text would tell.
        {"token": text, "logprob": logp, "bytes": None if "\ufffd" in text else list(text.encode()), "top_logprobs": []}
        for text, logp in choice.tokens
    ]
    return {"content": listed, "refusal": None}


def _usage(answer: ChatAnswer) -> dict[str, int] | None:
    if answer.prompt_tokens is None:
        return None
    prompt, written = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
