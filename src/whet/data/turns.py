"""What the formats have in common: columns that hold text or messages, made into messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from whet.config import DataConfig
from whet.data.faults import Place, kind_of
from whet.data.messages import parse_messages
from whet.records import Message


def turns(
    columns: Mapping[str, Any], name: str, role: Literal["user", "assistant"], place: Place
) -> tuple[Message, ...]:
    """A column that holds messages, one message's text, or HH-RLHF's transcript up to the answer's `Assistant:`."""
    if isinstance(columns[name], list):
        return parse_messages(columns[name], place[name])
    text = text_of(columns, name, place)
    if role == "user" and _ASKED.fullmatch(text):
        return transcript(text.strip().removesuffix("Assistant:"), place[name])
    return (Message(role=role, content=text),)


def instruction(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    """Alpaca's `instruction`, `input` and `history`: the conversation up to the question, none of it trained."""
    messages: list[Message] = []
    history = columns.get("history") or []
    for index, pair in enumerate(history):
        at = place["history"][index]
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise at.bad("not a pair", f"it is {kind_of(pair)}; the history is a list of [instruction, answer]")
        messages.append(Message(role="user", content=filled(pair[0], at[0])))
        messages.append(Message(role="assistant", content=filled(pair[1], at[1])))
    question = text_of(columns, "instruction", place)
    addition = columns.get("input")
    if addition:
        question += "\n" + filled(addition, place["input"])
    return (*as_context(messages), Message(role="user", content=question))


_TURN = re.compile(r"(?:^|\n\n|(?:^|\s+)###\s*)(Human|Assistant):[ \t]*")
_ASKED = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)


def is_transcript(text: str) -> bool:
    """Whether a text begins with a turn as HH-RLHF writes it, or Guanaco (`### Human:`)."""
    return _TURN.match(text.strip()) is not None


def transcript(text: str, place: Place) -> tuple[Message, ...]:
    """HH-RLHF's `\\n\\nHuman: ...\\n\\nAssistant: ...` or Guanaco's `### Human: ... ### Assistant: ...` as messages."""
    _, *parts = _TURN.split(text.strip())
    spoken = [
        Message(role="user" if who == "Human" else "assistant", content=said.strip())
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    for index, message in enumerate(spoken):
        if not message.content:
            raise place[index].bad(f"the {message.role} says nothing", "fill it in or leave the row out")
    return tuple(spoken)


def as_context(messages: Collection[Message]) -> tuple[Message, ...]:
    """The same messages, none of them trained unless it says so itself."""
    return tuple(
        replace(message, trained=False) if message.role == "assistant" and message.trained is None else message
        for message in messages
    )


def untrained(messages: Collection[Message]) -> tuple[Message, ...]:
    """The same messages as context only, whatever they say of themselves."""
    return tuple(replace(message, trained=False if message.role == "assistant" else None) for message in messages)


def with_system(
    messages: tuple[Message, ...], columns: Mapping[str, Any], config: DataConfig, place: Place
) -> tuple[Message, ...]:
    """A system message in front, where there is none: the row's own `system` column, or else `data.system`."""
    if messages[0].role in ("system", "developer"):
        return messages
    text = filled(columns["system"], place["system"]) if columns.get("system") else config.system
    return (Message(role="system", content=text), *messages) if text else messages


def text_of(columns: Mapping[str, Any], name: str, place: Place) -> str:
    """A column that holds text."""
    return filled(columns[name], place[name])


def filled(value: Any, place: Place) -> str:
    """The value, which must be text that says something."""
    if not isinstance(value, str):
        raise place.bad("not text", f"it is {kind_of(value)}")
    if not value.strip():
        raise place.bad("empty text", "fill it in or leave the row out")
    return value
