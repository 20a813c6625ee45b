"""The template door: the only way between messages and tokens.

Sampled tokens are never decoded and tokenized again: a later turn's prompt is the earlier tokens, as they
were, plus what `extend` renders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from whet.records import Ending, Message

LossOn = Literal["assistant", "completion", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A whole conversation as tokens, with the tokens that a loss may fall on."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]


class Template(Protocol):
    """Renders and parses one model's chat format."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn. A sampler stops at them, and training includes them."""

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, settings: Mapping[str, Any] = ...
    ) -> tuple[int, ...]:
        """The conversation so far and the opening of an assistant turn; `settings` are variables of the template."""

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        loss_on: LossOn = "assistant",
        settings: Mapping[str, Any] = ...,
    ) -> Rendered:
        """A finished conversation with its mask.

        The mask covers the content of trained assistant turns *and their stop token*, never headers.
        `Message.trained` overrides the rule for one message. Raises `DataError` where the mask cannot be
        established, saying why.
        """

    def text(self, text: str) -> Rendered:
        """Running text without turns, every token trained but the first, ended by a stop token."""

    def extend(
        self, tokens: Sequence[int], messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[int, ...]:
        """The next turn's prompt: `tokens` (prompt and completion as sampled), then these messages."""

    def parse(self, completion: Sequence[int], ending: Ending) -> Message:
        """The assistant message that sampled tokens spell; the stop token is not part of its content."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens included, for showing."""
