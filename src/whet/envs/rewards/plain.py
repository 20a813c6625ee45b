"""Rewards of plain code in this process (ours, or a Python recipe's), among them those that the environment gives; and
what all rewards share: whose fault a lost grade is, and columns that a task must have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from whet.envs.base import Attempt, Grade, OfAnyTask, Task
from whet.errors import DataError, GraderError, boundary
from whet.formulas.step import progress as made_progress
from whet.records import Message

LONGEST_SHOWN = 80
"""Characters of an answer in a note."""
Call = Callable[[Sequence[Attempt]], list[Grade]]
"""Grades attempts in one call; what fails is a failed grade."""
MOST_CONTROLS = 2


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


def of_environment(attempt: Attempt) -> Grade:
    """The sum of the environment's rewards of the play; not applicable where it gives none."""
    if not attempt.worth:
        return Grade(value=None)
    parts = attempt.worth if len(attempt.worth) > 1 else {}
    return Grade(value=sum(attempt.worth.values()), metrics=parts)


def of_turns(attempt: Attempt, *, progress: bool, smear: float) -> Grade:
    """The sum of the rewards of single turns, and each of them; with `progress`, of what each changed."""
    given = attempt.turn_rewards
    turns = made_progress(given, smear=smear) if progress else [value or 0.0 for value in given]
    return Grade(value=sum(turns), turns=tuple(turns))


def calls(attempt: Attempt) -> Grade:
    """The number of calls that the policy tried."""
    return Grade(value=float(sum(len(message.tool_calls) for message in attempt.messages)))


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
