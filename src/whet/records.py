"""The records that cross doors: messages, completions, episodes, token rows, steps.

Everything here is frozen and free of torch. A record is what two rooms have in common, so a reader of this page can
read any room. Per-token numbers travel inside the row that they describe, never beside it: as NumPy arrays, which
cost 4 to 8 bytes a number and no work in Python per token. Log-probabilities are natural logarithms.

Legend: N tokens, T trained tokens, K numbers of each token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from math import isnan, nan
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "developer", "user", "assistant", "tool"]
TokenIds = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
CallStatus = Literal[
    "ok", "invalid_json", "unclosed", "no_name", "unknown_tool", "bad_arguments", "over_limit", "raised"
]  # fmt: skip
Column = npt.NDArray[Any]
"""Numbers of a row's trained tokens, (T,) or (T, K)."""


def _constant(values: np.ndarray) -> bool:
    """Whether all entries have the same bytes, and there are several."""
    if len(values) < 2:
        return False
    bytes_TB = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    return bool((bytes_TB[1:] == bytes_TB[0]).all())


def token_ids(ids: npt.ArrayLike) -> TokenIds:
    """Token ids as the records hold them: a read-only int32 array; one that is given is kept, so do not change it."""
    return _frozen(ids, np.int32)


def _frozen(values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    found = np.asarray(values, dtype=dtype)
    if found.flags.writeable:  # a view: the caller's own array stays as it is
        found = found.view()
        found.flags.writeable = False
    return found


class _ByContent:
    """Equality for records that hold arrays: equal when every array has the same type, shape and bytes."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        pairs = ((getattr(self, each.name), getattr(other, each.name)) for each in fields(self))  # type: ignore[arg-type]
        return all(_same(left, right) for left, right in pairs)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[name], right[name]) for name in left)
    return bool(left == right)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that an assistant message asks for."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    status: CallStatus = "ok"
    error: str = ""
    """What is wrong with a call that is not ok, as the policy is told; it was not run, or it raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message, in the OpenAI shape."""

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    """Which tool a tool message is the result of."""
    trained: bool | None = None
    """Whether a loss may fall on it; None: decided by the role (assistant: yes)."""
    written: str = field(default="", compare=False)
    """All that the policy wrote, where some of its calls are not well formed."""

    def as_dict(self) -> dict[str, Any]:
        """In the OpenAI shape; absent things have no key."""
        calls = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in self.tool_calls
        ]
        beside = {"reasoning_content": self.thinking, "tool_calls": calls or None, "tool_call_id": self.tool_call_id}
        beside["name"] = self.name
        return {"role": self.role, "content": self.content} | {k: v for k, v in beside.items() if v is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer of a client that may fail: a message, or why there is none."""

    message: Message | None
    failure: str = ""
    timed_out: bool = False
    """Whether the failure was a deadline."""
    cut_off: bool = False
    """Whether the message ran out of its token budget: its end is not the model's own."""


class Ending(StrEnum):
    """Why a sampler stopped writing."""

    STOP = "stop"
    """It wrote a stop token, which is the last token of the completion."""
    LENGTH = "length"
    """It ran out of budget; there is no stop token, and none is ever added."""
    STOP_STRING = "stop_string"
    """Its last token completed a stop string. All tokens stay as sampled, and the string stays in the text."""


class Outcome(StrEnum):
    """How an episode ended. Only the first four say something about the policy's answer."""

    FINISHED = "finished"
    TRUNCATED = "truncated"
    GRADER_GAVE_UP = "grader_gave_up"
    """No grader finishes on this answer: it is scored lowest, and counted."""
    POLICY_ERROR = "policy_error"
    """Its own text broke the environment (a call that hangs or kills its process): it is scored lowest, and counted."""
    GRADER_ERROR = "grader_error"
    GRADER_TIMEOUT = "grader_timeout"
    ENVIRONMENT_ERROR = "environment_error"
    ENGINE_ERROR = "engine_error"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion(_ByContent):
    """What a token sampler wrote, with what it knew about it.

    `logprobs[t]` is log p(tokens[t] | everything before) under the distribution that was sampled from,
    i.e. after temperature. `version` counts the weight hand-overs that the sampler had seen when it began.
    """

    tokens: TokenIds
    logprobs: npt.NDArray[np.float32]
    version: int
    ending: Ending
    later: tuple[tuple[int, int], ...] = ()
    """(first token, version), in order, for each hand-over while it was written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_ids(self.tokens))
        object.__setattr__(self, "logprobs", _frozen(self.logprobs, np.float32))
        assert len(self.tokens) == len(self.logprobs), "one log-probability per sampled token"

    @property
    def versions(self) -> npt.NDArray[np.int32]:
        """The version of the weights that wrote each token."""
        found = np.full(len(self.tokens), self.version, np.int32)
        for first, version in self.later:
            found[first:] = version
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn(_ByContent):
    """One exchange with the sampler: the tokens that it was shown and those that it wrote."""

    prompt: TokenIds
    completion: Completion
    state: str | None = None
    """The environment's state before it, as a key: equal for equal states; None: the environment gives none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_ids(self.prompt))


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
    """FINISHED, GRADER_GAVE_UP, or the grader's failure."""
    note: str = ""
    steps: tuple[StepScore, ...] = ()
    """Weighed grades of single steps, in order, where rewards give them; they are not part of `value`."""
    turns: tuple[float, ...] = ()
    """Weighed rewards of single turns, in order, where rewards give them; their sum is part of `value`."""


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
    advantage: float | None = None
    """Mean advantage of its trained tokens, once an algorithm has given them one."""

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRow(_ByContent):
    """One training sequence: its tokens, which of them are trained, and numbers for the trained ones.

    `trained[t]` says that token t is a target (its log-probability given tokens[:t] enters the loss).
    Every column has one entry per *trained* token, in order: `weight`, `old_logp`, `advantage`, `ref_logp` (T,), or
    a teacher's top-k (T, K). The first token has no past and is never trained.
    """

    tokens: TokenIds
    trained: Flags
    columns: Mapping[str, Column] = field(default_factory=dict)
    shared: int = 0
    """How many leading tokens (the prompt) this row has in common with the other rows of its atom."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_ids(self.tokens))
        object.__setattr__(self, "trained", _frozen(self.trained, np.bool_))
        object.__setattr__(self, "columns", {name: _frozen(values) for name, values in self.columns.items()})
        assert len(self.tokens) == len(self.trained), "one flag per token"
        assert len(self.tokens) and not self.trained[0], "the first token cannot be trained"
        count = self.trained_count
        for name, values in self.columns.items():
            assert len(values) == count, f"column {name} has {len(values)} values for {count} trained tokens"

    def __getstate__(self) -> tuple[Any, ...]:
        """For another process: a column whose entries are all the same is sent as one of them."""
        sent = {name: (v[:1], len(v)) if _constant(v) else v for name, v in self.columns.items()}
        return self.tokens, self.trained, sent, self.shared

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        tokens, trained, sent, shared = state
        columns = {name: np.repeat(v[0], v[1], axis=0) if isinstance(v, tuple) else v for name, v in sent.items()}
        TokenRow.__init__(self, tokens=tokens, trained=trained, columns=columns, shared=shared)

    @property
    def trained_count(self) -> int:
        """Number of trained tokens, the length of every column."""
        return int(np.count_nonzero(self.trained))

    @property
    def prompt(self) -> bytes:
        """The shared tokens as a key: equal for rows that begin with the same prompt."""
        return self.tokens[: self.shared].tobytes()

    def with_columns(self, **columns: npt.ArrayLike) -> TokenRow:
        """The same row with these columns added or replaced; a number stands for the same one at every token."""
        count = self.trained_count
        given = {name: np.full(count, v) if np.ndim(v) == 0 else np.asarray(v) for name, v in columns.items()}
        return replace(self, columns={**self.columns, **given})


@dataclass(frozen=True, slots=True, kw_only=True)
class Atom:
    """Rows that belong together: one for SFT, a pair for DPO, a group for GRPO.

    Where `shared > 0` all rows begin with the same `shared` tokens, and the engine computes those once for all rows
    that it computes together: all of them for an objective that compares rows, else as many as its budget allows.
    """

    rows: tuple[TokenRow, ...]

    def __post_init__(self) -> None:
        assert self.rows, "an atom has rows"
        first = self.rows[0]
        for row in self.rows:
            assert row.shared == first.shared, "rows of an atom share the same prompt"
            assert row.prompt == first.prompt, "shared tokens must be equal"
            assert not row.trained[: row.shared].any(), "shared tokens are context, never targets"

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


def largest(norms: Sequence[float]) -> float:
    """The largest of some norms; NaN if one is, and 0 if there are none."""
    return nan if any(map(isnan, norms)) else max(norms, default=0.0)


def add_metrics(left: Mapping[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
    """The two sets of metrics, summed name by name."""
    merged = dict(left)
    for name, metric in right.items():
        merged[name] = merged[name] + metric if name in merged else metric
    return merged


State = Mapping[str, Any]
"""Floats by name, and a NumPy array where there is one number for each of many tasks: a copy, not an entry each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step(_ByContent):
    """What an algorithm yields after each optimizer step; the runner logs, evaluates and checkpoints it."""

    index: int
    """1 for the first step of the stage."""
    metrics: Mapping[str, float]
    groups: tuple[Group, ...] = ()
    """The episodes of this step, for the rollout files; empty for supervised stages."""
    state: State = field(default_factory=dict)
    """What the algorithm needs, besides weights and optimizer, to go on after this step as if never stopped."""
    notes: tuple[str, ...] = ()
    """Findings of this step for a person to read, one line each; they are in the stage's log files."""
    ill: bool = False
    """Whether the algorithm will end after it: nothing is to be built on such a step, and it is not checkpointed."""


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed derived from what it is for: the same (run, stage, step, index) always draws the same numbers.

    Seeds are never carried from step to step, so a resumed run draws what the uninterrupted one would have.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
