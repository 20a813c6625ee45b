"""The environment door and the reward door: message space only. No tokens, no weights, no torch.

A `Task` is data; an `Environment` is one play of it, used once. A `Rubric` grades finished episodes by its rewards. All
of it can be tested with a scripted sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from whet.data.base import Task as Task
from whet.errors import DataError, GraderError, boundary
from whet.records import Message, Score, StepScore, ToolCall

LONGEST_SHOWN = 80
"""Characters of an answer in a note."""
MOST_CONTROLS = 2
"""Of a grader, in a row, that may fail before no more are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What a rubric grades: a task and the conversation that answered it."""

    task: Task
    messages: tuple[Message, ...]
    """What was added to the task's messages: the policy's turns and any observations."""
    completion_tokens: tuple[int, ...] = ()
    """Tokens that the policy sampled, over all turns; none of an answer of a file."""
    truncated: bool = False
    max_tokens: int = 0
    """Most tokens that the answer could have: the sampler's limit, or where it is less what the prompt left."""
    worth: Mapping[str, float] = field(default_factory=dict)
    """The environment's rewards of the play, by name; empty where it gives none."""
    turn_rewards: tuple[float | None, ...] = ()
    """The environment's reward of each of the policy's turns; None: it gave none."""
    correct: bool | None = None
    """The verdict of the first reward that judges; rewards that do not judge run after it and may read it."""

    @property
    def answer(self) -> str:
        """Text of the last assistant message, thinking included as it was written."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


class Reward(Protocol):
    """One named part of a score. Grades many attempts at once, so that it may batch or run in parallel."""

    @property
    def name(self) -> str:
        """Name in the metrics (`rewards/NAME`)."""

    @property
    def weight(self) -> float:
        """What its value is multiplied by in the score."""

    @property
    def judges(self) -> bool:
        """Whether a value of 1 means that the answer is right (a verifier), or it only shapes (format, length)."""

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt. Never raises for a bad answer; a failure of its own is a failed Grade."""

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError`, naming the task, where one lacks what this reward needs. For use before training."""

    def close(self) -> None:
        """End worker processes, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfAnyTask:
    """What a reward has that grades any task, ends no process, and does not judge."""

    name: str
    weight: float
    judges: bool = False

    def check(self, tasks: Sequence[Task]) -> None:
        """Any task will do."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """One reward's result for one attempt. `value is None` with no failure means: not applicable, adds nothing."""

    value: float | None
    failure: str = ""
    """Why grading itself failed (crash, timeout, NaN); such an attempt is unscored as a whole."""
    timed_out: bool = False
    gave_up: bool = False
    """The answer is one on which no grader finishes, a control job beside it passed: `value` is the lowest."""
    note: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers to log beside the value; they are not part of the score."""
    steps: tuple[StepScore, ...] = ()
    """Grades of single steps, in order; a value of None with steps is process supervision alone."""
    turns: tuple[float, ...] = ()
    """Where the value is a sum over the policy's turns: each of them, in order."""


class Rubric(Protocol):
    """Named rewards with weights, summed into a score."""

    def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
        """One score for each attempt."""

    def close(self) -> None:
        """Release the rewards' processes."""


# ----------------------------------------------------------------------------------- environments


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How a play begins."""

    messages: tuple[Message, ...]
    """What the policy answers first."""
    tools: tuple[dict[str, Any], ...] = ()
    """What it may call, in the OpenAI shape."""
    state: str | None = None
    """As in `Observed`."""
    after: int | None = None
    """The turn, from 0, whose conversation the messages continue; None: they are all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What followed an assistant message."""

    messages: tuple[Message, ...] = ()
    over: bool = False
    reward: float | None = None
    """Of this turn."""
    state: str | None = None
    """The state in which the next turn begins, as a key: equal for equal states."""
    calls: tuple[ToolCall, ...] = ()
    """The message's calls with what became of each; empty: as they were."""
    opens: Opening | None = None
    """Another conversation that the policy goes on with in place of this one; `messages` are then empty."""


class Environment(Protocol):
    """One play of one task.

    What `start` and `close` raise, and `EnvironmentFailure` (`whet.Broken`) anywhere, is the machinery's failure: the
    play is tried once more, then unscored. What `step` raises otherwise the policy's message caused: it is scored
    lowest (`Outcome.POLICY_ERROR`).
    """

    async def start(self, *, seed: int) -> Opening:
        """The first messages, and the tools; whatever is drawn at random follows from the seed."""

    async def step(self, message: Message) -> Observed:
        """What follows this assistant message, and whether the play is over."""

    async def close(self) -> Mapping[str, float | Sequence[float]]:
        """End the play, over or not. Returns its rewards by name, apart from those of turns; empty: none.

        Under `turns` are the rewards of its turns, in order, where they are known only now.
        """


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """One play of a task that asks once."""

    task: Task

    async def start(self, *, seed: int) -> Opening:
        """The task's own messages."""
        return Opening(messages=self.task.messages)

    async def step(self, message: Message) -> Observed:
        """No observation; the episode is over."""
        return Observed(over=True)

    async def close(self) -> Mapping[str, float]:
        """No rewards."""
        return {}


# ----------------------------------------------------------------------------- what rewards share


Call = Callable[[Sequence[Attempt]], list[Grade]]
"""Grades attempts in one call; what fails is a failed grade."""


class Separate:
    """A reward that grades each attempt by itself, so that it may be asked as attempts come (`rubric`)."""

    __slots__ = ()
    alone = True
    """False: it only happens to be of this class, and compares attempts."""
    controlled = False
    """Whether `each` decides by a control of its own whose fault a lost grade is."""

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt."""
        return self.settle(attempts, self.each(attempts, step=step), step=step)

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """What each attempt gets, whichever others are there."""
        raise NotImplementedError

    def settle(self, attempts: Sequence[Attempt], grades: Sequence[Grade], *, step: int) -> list[Grade]:
        """The same once all are there: whose fault a lost grade is, others show."""
        return list(grades) if self.controlled else attribute(attempts, grades, partial(self.each, step=step))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainReward(Separate, OfAnyTask):
    """A function of one attempt as a reward. What it raises concerns that attempt alone."""

    function: Callable[[Attempt], Grade]
    check_task: Callable[[Task], object] | None = None
    """Raises `DataError` for a task that it cannot grade."""

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """The function's grade of each attempt."""
        return [self._grade(attempt) for attempt in attempts]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task that it cannot grade."""
        if self.check_task is not None:
            for task in tasks:
                self.check_task(task)

    def _grade(self, attempt: Attempt) -> Grade:
        try:
            with boundary(GraderError, "the reward raised"):
                return self.function(attempt)
        except (GraderError, DataError) as error:
            return Grade(value=None, failure=str(error))


def attribute(attempts: Sequence[Attempt], grades: Sequence[Grade], call: Call) -> list[Grade]:
    """The grades, where one that failed and whose control passed has the lowest value of the others, at most 0.

    A control decides who is to blame for a lost grade, never what the answer printed: the same grader on the same
    task with another answer, one that was graded beside it, else an empty one. Where it passes, the answer's own text
    broke the grader: it is scored lowest and counted (`Grade.gave_up`), so that no policy leaves the statistics by
    breaking something. Where it fails too, the grader or the machine is broken, and the attempt stays unscored.
    """
    failed = [place for place, grade in enumerate(grades) if grade.failure]
    if not failed:
        return list(grades)
    passed = dict.fromkeys((attempt.task.id for attempt in attempts), False)
    passed |= {a.task.id: True for a, grade in zip(attempts, grades, strict=True) if not grade.failure}
    lowest = min((grade.value for grade in grades if grade.value is not None), default=0.0)
    lost = 0  # controls in a row: a grader that fails on every task is not tried on all of them
    for task in dict.fromkeys(attempts[place].task.id for place in failed):
        if not passed[task] and lost < MOST_CONTROLS:
            control = next(attempts[place] for place in failed if attempts[place].task.id == task)
            passed[task] = not call([empty(control)])[0].failure
            lost = 0 if passed[task] else lost + 1
    return [
        Grade(value=min(0.0, lowest), gave_up=True, note=f"the answer broke the grader: {grade.failure}")
        if grade.failure and passed[attempt.task.id]
        else grade
        for attempt, grade in zip(attempts, grades, strict=True)
    ]


def empty(attempt: Attempt) -> Attempt:
    """The attempt with an empty answer."""
    return replace(attempt, messages=(Message(role="assistant", content=""),))


def graded(right: bool, given: str, gold: object) -> Grade:
    """1, or 0 with what was read in the answer beside the gold one: a person sees why it is wrong."""
    return Grade(value=1.0) if right else Grade(value=0.0, note=f"read {_short(given)}, gold is {_short(str(gold))}")


def _short(text: str) -> str:
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ...")


def require(task: Task, column: str, reward: str) -> object:
    """The task's value in this column. Raises `DataError` where it has none."""
    value = task.columns.get(column)
    if value is None:
        has = ", ".join(sorted(task.columns)) or "none"
        why = "it is null here" if column in task.columns else f"the row's columns: {has}"
        raise DataError(f"task {task.id}: reward {reward!r} needs the column {column!r}; {why}")
    return value
