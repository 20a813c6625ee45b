"""The data door: rows become typed examples, each of which knows where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whet.records import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row stands, for error messages: `train.jsonl:17`."""

    source: str
    line: int
    """Line of the file, or number of the row, from 1."""
    part: int | None = None
    """Number of the example within its row, from 1, where a row makes several (a tree of messages)."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" + (f" part {self.part}" if self.part else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One raw row: column names to values, as parsed."""

    origin: Origin
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A training example for SFT: messages, or running text where `text` is set."""

    origin: Origin
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Answers to one prompt in order of preference, the best first: a pair, or a ranked list (InstructGPT)."""

    origin: Origin
    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    """At least two; each is what follows the prompt, nearly always one assistant message."""
    tools: tuple[dict[str, Any], ...] = ()
    margin: float | None = None
    """By how much the first of two answers is better, where the row says so (Llama-2)."""
    confidence: float = 1.0
    """The probability that the first of two answers is the better one, where labels are soft."""
    tied: int = 0
    """Answers of the row that were as good as one of these and are left out."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One answer labelled good or bad (KTO)."""

    origin: Origin
    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    good: bool
    tools: tuple[dict[str, Any], ...] = ()
    left_out: int = 0
    """Answers of the same comparison that are neither good nor bad: tied, or between the best and the worst."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """One answer with ratings by named objectives (HelpSteer, UltraFeedback)."""

    origin: Origin
    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    ratings: Mapping[str, float]
    """Finite, at least one; an objective without a rating is absent, which is not zero."""
    unread: tuple[str, ...] = ()
    """Other objectives that it is rated by and that are not used."""
    tools: tuple[dict[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepwise:
    """One answer cut into steps, with how right each is (process supervision)."""

    origin: Origin
    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    """Concatenated they are the answer, separators included."""
    labels: tuple[float | None, ...]
    """In [0, 1], one for each step up to the first wrong one; what follows a wrong step has no label. None: not
    graded."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task for RL or evaluation: the messages to answer, and every other column for the rewards."""

    origin: Origin
    messages: tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    conversational: bool = True
    """Whether the row's prompt was a list of messages; rewards then get messages, and text otherwise."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt with an answer, or without one, and every other column of its row."""

    origin: Origin
    prompt: tuple[Message, ...]
    answer: Message | None
    columns: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The prompt: equal for answers to the same one."""
        return repr(self.prompt)

    @property
    def text(self) -> str:
        """What was answered; empty where nothing was."""
        return "" if self.answer is None else self.answer.content
