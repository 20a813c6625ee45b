"""The serving door: what answers chat completions, and the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from whet.records import Message, ToolCall, seed_of
from whet.serving.wire import ChatBody

Heard = Callable[[int, str], None]
"""Called with more text of a choice while it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatChoice:
    """One answer."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    cut_off: bool = False
    """Whether it ran out of tokens."""
    tokens: tuple[tuple[str, float], ...] | None = None
    """Each token's text and log-probability, where that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """All choices of a completion."""

    choices: tuple[ChatChoice, ...]
    prompt_tokens: int | None = None
    """None: tokens are not counted here."""
    completion_tokens: int = 0


class ChatCaller(Protocol):
    """The holder of an API key: its models and their answers."""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models that it may ask."""

    async def answer(self, asked: ChatBody, heard: Heard) -> ChatAnswer:
        """The answer; raises `Refusal`. The texts passed to `heard` are the beginning of the choice's content.

        Cancelling it stops the work.
        """


class Host(Protocol):
    """What a server serves."""

    def caller(self, key: str) -> ChatCaller | None:
        """The caller with this key (empty: none was sent); None where the key opens nothing."""


def said(message: Message) -> tuple[str, tuple[ToolCall, ...]]:
    """Text and calls as a client gets them: with a call that is not well formed all of it is text, as written."""
    sound = all(call.status == "ok" for call in message.tool_calls)
    return (message.content, message.tool_calls) if sound else (message.written, ())


def call_id(*parts: str | int) -> str:
    """Nine letters and digits, which Mistral's templates ask for, from what the call is known by."""
    return f"{seed_of(*parts):016x}"[-9:]
