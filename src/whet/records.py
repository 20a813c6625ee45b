"""The records that cross doors: messages, completions, episodes, token rows, steps.

Everything here is frozen and standard library only. A record is what two rooms have in common, so whoever
has read this page can read any room. Per-token numbers travel inside the row that they describe, never beside it.

Sequences of tokens are tuples of int; log-probabilities are natural logarithms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that an assistant message asks for."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message, in the OpenAI shape."""

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    trained: bool | None = None
    """Whether a loss may fall on it; None: decided by the role (assistant: yes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of asking somebody who may fail: a message, or why there is none."""

    message: Message | None
    failure: str = ""
    timed_out: bool = False
    """Whether the failure was a deadline."""
    cut_off: bool = False
    """Whether the message ran out of its token budget: it ends where nobody chose to end it."""


class Ending(StrEnum):
    """Why a sampler stopped writing."""

    STOP = "stop"
    """It wrote a stop token, which is the last token of the completion."""
    LENGTH = "length"
    """It ran out of budget; there is no stop token, and none is ever added."""


class Outcome(StrEnum):
    """How an episode ended. Only the first two say something about the policy's answer."""

    FINISHED = "finished"
    TRUNCATED = "truncated"
    GRADER_ERROR = "grader_error"
    GRADER_TIMEOUT = "grader_timeout"
    ENVIRONMENT_ERROR = "environment_error"
    ENGINE_ERROR = "engine_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a token sampler wrote, with what it knew about it.

    `logprobs[t]` is log p(tokens[t] | everything before) under the distribution that was sampled from,
    i.e. after temperature. `version` counts the weight hand-overs that the sampler had seen.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: int
    ending: Ending

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.logprobs), "one log-probability per sampled token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange with the sampler: the tokens that it was shown and those that it wrote."""

    prompt: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScore:
    """The grade of one step of an answer: process supervision."""

    end: int
    """Characters of the answer (the last assistant message) up to the end of the step; the step is what precedes."""
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStep:
    """The grade of one step, at the token that completes it."""

    last: int
    """Place (from 0) among the tokens that were sampled in the episode's last turn."""
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A grade with named parts. `value is None` means: never graded, excluded and counted (never zero)."""

    value: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    correct: bool | None = None
    """Whether the answer was right, apart from any shaping; what dynamic sampling and evaluations look at."""
    outcome: Outcome = Outcome.FINISHED
    """FINISHED, or the grader's failure."""
    note: str = ""
    steps: tuple[StepScore, ...] = ()
    """Weighed grades of single steps, in order, where rewards give them; they are not part of `value`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One play of one task: the conversation, the sampled tokens, the score and how it ended."""

    task: str
    """Identity of the task; episodes of one task form a group."""
    sample: int
    """Number of this episode among its task's episodes, from 0."""
    seed: int
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    score: Score
    outcome: Outcome
    steps: tuple[TokenStep, ...] = ()
    """`score.steps`, placed on the tokens of the last turn."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the policy wrote, over all turns."""
        return sum(len(turn.completion.tokens) for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The episodes of one task that were played for one step."""

    task: str
    episodes: tuple[Episode, ...]
    greedy: Episode | None = None
    """The greedy answer, where the algorithm's baseline is its reward (ReMax); never trained on."""

    @property
    def scored(self) -> tuple[Episode, ...]:
        """The episodes that have a value; only they enter statistics and gradients."""
        return tuple(episode for episode in self.episodes if episode.score.value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One training sequence: its tokens, which of them are trained, and numbers for the trained ones.

    `trained[t]` says that token t is a target (its log-probability given tokens[:t] enters the loss).
    Every column has one number per *trained* token, in order: `weight`, `old_logp`, `advantage`, `ref_logp` ...
    The first token has no past and is never trained.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shared: int = 0
    """How many leading tokens (the prompt) this row has in common with the other rows of its atom."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.trained), "one flag per token"
        assert self.tokens and not self.trained[0], "the first token cannot be trained"
        count = self.trained_count
        for name, values in self.columns.items():
            assert len(values) == count, f"column {name} has {len(values)} values for {count} trained tokens"

    @property
    def trained_count(self) -> int:
        """Number of trained tokens, the length of every column."""
        return sum(self.trained)

    def with_columns(self, **columns: tuple[float, ...]) -> TokenRow:
        """The same row with these columns added or replaced."""
        return TokenRow(
            tokens=self.tokens,
            trained=self.trained,
            columns={**self.columns, **columns},
            shared=self.shared,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Atom:
    """Rows that must share a micro-batch: one for SFT, a pair for DPO, a group for GRPO.

    Where `shared > 0` all rows begin with the same `shared` tokens, and the engine computes those once.
    """

    rows: tuple[TokenRow, ...]

    def __post_init__(self) -> None:
        assert self.rows, "an atom has rows"
        first = self.rows[0]
        for row in self.rows:
            assert row.shared == first.shared, "rows of an atom share the same prompt"
            assert row.tokens[: row.shared] == first.tokens[: first.shared], "shared tokens must be equal"
            assert not any(row.trained[: row.shared]), "shared tokens are context, never targets"

    @property
    def cost(self) -> int:
        """Tokens that a forward pass computes: the shared prompt once, then each row's own."""
        shared = self.rows[0].shared
        return shared + sum(len(row.tokens) - shared for row in self.rows)


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean that can be added: `total / weight`. Sums over micro-batches and ranks stay exact."""

    total: float
    weight: float = 1.0

    @property
    def mean(self) -> float:
        """The mean, or NaN where nothing was counted."""
        return self.total / self.weight if self.weight else float("nan")

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.weight + other.weight)


def add_metrics(left: Mapping[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
    """The two sets of metrics, summed name by name."""
    merged = dict(left)
    for name, metric in right.items():
        merged[name] = merged[name] + metric if name in merged else metric
    return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an algorithm yields after each optimizer step; the runner logs, evaluates and checkpoints it."""

    index: int
    """1 for the first step of the stage."""
    metrics: Mapping[str, float]
    groups: tuple[Group, ...] = ()
    """The episodes of this step, for the rollout files; empty for supervised stages."""
    state: Mapping[str, float] = field(default_factory=dict)
    """What the algorithm needs, besides weights and optimizer, to go on after this step as if never stopped."""
    notes: tuple[str, ...] = ()
    """What a person should hear about this step, one line each."""
    ill: bool = False
    """Whether the algorithm will end after it: nothing is to be built on such a step, and it is not checkpointed."""


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed derived from what it is for: the same (run, stage, step, index) always draws the same numbers.

    Seeds are never carried from step to step, so a resumed run draws what the uninterrupted one would have.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
