"""Whose fault a lost grade is. One rule: a control beside it decides, never what the answer printed.

The control is the same grader on the same task with another answer: one that was graded beside it, else an empty one.
Where it passes, the answer's own text broke the grader: it is scored lowest and counted (`Grade.gave_up`), so that no
policy leaves the statistics by breaking something. Where it fails too, the grader or the machine is broken, and the
attempt stays unscored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from whet.envs.base import Attempt, Grade
from whet.records import Message

Call = Callable[[Sequence[Attempt]], list[Grade]]
"""Grades attempts in one call; what fails is a failed grade."""


MOST_CONTROLS = 2


def attribute(attempts: Sequence[Attempt], grades: Sequence[Grade], call: Call) -> list[Grade]:
    """The grades, where one that failed and whose control passed has the lowest value of the others, at most 0."""
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
