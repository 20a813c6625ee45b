"""The data door: rows become typed examples, each of which knows where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

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
class Example:
    """What every training example has."""

    origin: Origin
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation(Example):
    """A training example for SFT: messages, or running text where `text` is set."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Example):
    """Answers to one prompt in order of preference, the best first: a pair, or a ranked list (InstructGPT)."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Example):
    """One answer labelled good or bad (KTO)."""

    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    good: bool
    tools: tuple[dict[str, Any], ...] = ()
    left_out: int = 0
    """Answers of the same comparison that are neither good nor bad: tied, or between the best and the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated(Example):
    """One answer with ratings by named objectives (HelpSteer, UltraFeedback)."""

    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    ratings: Mapping[str, float]
    """Finite, at least one; an objective without a rating is absent, which is not zero."""
    unread: tuple[str, ...] = ()
    """Other objectives that it is rated by and that are not used."""
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepwise(Example):
    """One answer cut into steps, with how right each is (process supervision)."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    """Concatenated they are the answer, separators included."""
    labels: tuple[float | None, ...]
    """In [0, 1], one for each step up to the first wrong one; what follows a wrong step has no label. None: not
    graded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem for RL or evaluation: what the policy is shown, and what the rewards know."""

    id: str
    """Of a row of a file where it stands, `train.jsonl:17`."""
    messages: tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Gold answers and whatever else the row has; flows to reward functions by name."""
    conversational: bool = True
    """False: the row's prompt was plain text, so that functions with TRL's signature get strings, as there."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template (`chat_template_kwargs` of its row)."""


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


Item = TypeVar("Item")


class Lazy(Sequence[Item], Generic[Item]):
    """`size` items, each made by `make(index)` whenever it is asked for."""

    def __init__(self, size: int, make: Callable[[int], Item]) -> None:
        self._range, self._make = range(size), make

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self._make(place) for place in self._range[index]]
        return self._make(self._range[index])
