"""Rewards that grade one attempt at a time with plain code in this process. The code is ours or a Python recipe's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whet.envs.base import Attempt, Grade, Task
from whet.envs.rewards.blame import attribute
from whet.errors import DataError, GraderError, boundary

LONGEST_SHOWN = 80
"""Characters of an answer in a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainReward:
    """A function of one attempt as a reward. What it raises concerns that attempt alone."""

    name: str
    weight: float
    judges: bool
    function: Callable[[Attempt], Grade]
    check_task: Callable[[Task], object] | None = None
    """Raises `DataError` for a task that it cannot grade."""

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt; `blame` decides on those that raised."""
        return attribute(attempts, self._each(attempts), self._each)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task that it cannot grade."""
        if self.check_task is not None:
            for task in tasks:
                self.check_task(task)

    def close(self) -> None:
        """Nothing to end."""

    def _each(self, attempts: Sequence[Attempt]) -> list[Grade]:
        return [self._grade(attempt) for attempt in attempts]

    def _grade(self, attempt: Attempt) -> Grade:
        try:
            with boundary(GraderError, "the reward raised"):
                return self.function(attempt)
        except (GraderError, DataError) as error:
            return Grade(value=None, failure=str(error))


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
