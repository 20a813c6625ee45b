"""The template door: the only way between messages and tokens.

Sampled tokens are never decoded and tokenized again: a later turn's prompt is the earlier tokens, as they
were, plus what `extend` renders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from whet.errors import DataError
from whet.records import Ending, Message
from whet.templates.dialects import Dialect

LossOn = Literal["assistant", "completion", "all"]

Tools = Sequence[dict[str, Any]]
"""Tools in the OpenAI shape."""

Settings = Mapping[str, Any]
"""Variables of a template beside messages and tools: `enable_thinking`, say."""

NO_SETTINGS: Settings = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Chat:
    """What a template writes: messages, the tools that may be called, and its variables."""

    messages: Sequence[Message]
    tools: Tools = ()
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A whole conversation as tokens, with the tokens that a loss may fall on."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation written out, before it is tokenized."""

    pieces: tuple[tuple[str, bool], ...]
    """Texts that join to the whole, each tokenized by itself, and whether a loss may fall on it."""
    running: bool = False
    """Text without turns: the tokenizer puts around it what it does by itself, and a stop token ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A script as tokens."""

    tokens: npt.NDArray[np.int32]
    """(T,)"""
    trained: npt.NDArray[np.bool_]
    """(T,); the first is never trained."""


class TooLong(DataError):
    """A script has more tokens than are allowed; how many more was not counted."""


class Template(Protocol):
    """Renders and parses one model's chat format."""

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer and of all else that decides how a conversation is written."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn. A sampler stops at them, and training includes them."""

    @property
    def turn_end(self) -> int:
        """The one of them that the template itself writes after an assistant's turn."""

    @property
    def dialect(self) -> Dialect:
        """How calls of tools are read. Raises `DataError` where the template cannot write tools or calls."""

    def stops(self, tools: Tools) -> tuple[str, ...]:
        """Strings at which a sampler ends a turn with these tools: it goes on in the same answer, behind the result.

        Raises `DataError` as `dialect` does.
        """

    @property
    def forgets(self) -> tuple[str, ...]:
        """After whose turns (user, tool) the template leaves out the thinking of earlier answers, which plays keep."""

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        settings: Settings = NO_SETTINGS,
        untrusted: bool = False,
    ) -> tuple[int, ...]:
        """The conversation so far and the opening of an assistant turn; `settings` are variables of the template.

        Text that spells a special token is refused; where it is `untrusted` it is kept, as ordinary tokens.
        """

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        loss_on: LossOn = "assistant",
        settings: Settings = NO_SETTINGS,
    ) -> Rendered:
        """A finished conversation with its mask.

        The mask covers the content of trained assistant turns *and their stop token*, never headers.
        `Message.trained` overrides the rule for one message. Raises `DataError` where the mask cannot be
        established, saying why.
        """

    def text(self, text: str) -> Rendered:
        """Running text without turns, every token trained but the first, ended by a stop token."""

    def script(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        loss_on: LossOn = "assistant",
        settings: Settings = NO_SETTINGS,
    ) -> Script:
        """What `conversation` tokenizes; raises as it does."""

    def running(self, text: str) -> Script:
        """What `text` tokenizes; raises as it does."""

    def encode(self, scripts: Sequence[Script], *, most: int | None = None) -> list[Encoded | DataError]:
        """Many scripts at once, on all cores and without the interpreter's lock.

        In the place of one that cannot be trained on stands why; one that is far longer than `most` tokens is not
        tokenized to its end (`TooLong`).
        """

    def extend(
        self, tokens: Sequence[int], messages: Sequence[Message], *, settings: Settings = NO_SETTINGS
    ) -> tuple[int, ...]:
        """The next turn's prompt: `tokens` (prompt and completion as sampled), then these messages, untrusted.

        `tokens` that do not end with a stop token end with a call in an answer that goes on behind its result.
        """

    def parse(self, completion: Sequence[int], ending: Ending, tools: Tools = ()) -> Message:
        """The assistant message that sampled tokens spell; the stop token is not part of its content.

        With `tools` its calls are apart from the content, those that are not well formed included. A completion that
        was cut off has none. Raises `DataError` where the template cannot write tools or calls.
        """

    def shorten(self, text: str, most: int) -> str:
        """The text, its middle left out where it has more tokens than that."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens included, for showing."""
