"""Messages as chat templates take them, which of them are trained, and what of them must be in the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.errors import DataError
from whet.records import Message
from whet.templates.base import LossOn

OWN_TEMPLATE = "give model.chat_template a Jinja file"

OURS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
"""Variables of a template that settings may not have."""


def marked_messages(messages: Sequence[Message], loss_on: LossOn) -> dict[int, bool]:
    """The messages that are trained where their surroundings are not, or the other way round."""
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    by_rule = {"assistant": turns, "completion": turns[-1:], "all": range(len(messages))}[loss_on]
    marked: dict[int, bool] = {}
    for index, message in enumerate(messages):
        trained = index in by_rule if message.trained is None else message.trained
        if trained == (loss_on == "all"):
            continue
        if message.role != "assistant":
            raise DataError(
                f"messages[{index}]: a {message.role} message is marked as {'' if trained else 'not '}trained, but "
                f"under loss_on: {loss_on} only assistant messages can be told apart; remove the mark"
            )
        marked[index] = trained
    return marked


def refuse_lost(text: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """What a template silently leaves out, the model would be trained to guess."""
    for index, message in enumerate(messages):
        if message.role in ("system", "developer", "user") and message.content.strip() not in text:
            raise DataError(f"messages[{index}]: the chat template leaves out {message.role} messages; {OWN_TEMPLATE}")
    if any(tool["function"]["name"] not in text for tool in tools):
        raise DataError(f"tools: the chat template leaves them out; {OWN_TEMPLATE} that writes tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How a template expects tool calls."""

    as_text: bool = False
    """Arguments as JSON text, which it prints; else as an object."""
    bare: bool = False
    """No content beside them (null); else an empty text."""


def as_dict(message: Message, calls: Calls) -> dict[str, Any]:
    """The message as chat templates expect it; absent things have no key."""
    bare = calls.bare and message.tool_calls and not message.content
    fields: dict[str, Any] = {"role": message.role, "content": None if bare else message.content}
    if message.thinking is not None:
        fields["reasoning_content"] = message.thinking
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)
                    if calls.as_text
                    else dict(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Every key and every value without parts, each in the forms in which templates write it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(str(key))
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        yield (value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1])
    else:
        yield (json.dumps(value), str(value))
