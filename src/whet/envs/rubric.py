"""A rubric: named rewards, weighed and added. What could not be graded is unscored, never zero."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

from whet.envs.base import Attempt, Grade, Reward, Task
from whet.errors import ConfigError
from whet.records import Outcome, Score, StepScore

LARGEST = 1e30
"""A value beyond it (or NaN) is a grader's mistake: sums and squares of such numbers are not finite in float32."""


@runtime_checkable
class Describes(Protocol):
    """A reward that has something to say before training."""

    def describe(self) -> str:
        """One line."""


class WeightedRubric:
    """score = sum of weight * value over the rewards that apply to an attempt.

    One failed reward leaves the whole attempt unscored: a sum without one of its parts is another quantity.
    `Score.correct` is the word of the first reward that judges.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        for name, count in Counter(reward.name for reward in rewards).items():
            if count > 1:
                raise ConfigError(f"rewards: {count} of them are named {name!r}; give each its own name")
        self.rewards = tuple(rewards)
        self.took: defaultdict[str, list[float]] = defaultdict(list)
        """By reward: the seconds that an answer took in each call."""
        self._judge = next((reward for reward in rewards if reward.judges), None)

    def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
        """One score for each attempt. `step` is what reward functions see as the trainer's step."""
        columns: dict[str, list[Grade]] = {}
        for reward in sorted(self.rewards, key=lambda reward: not reward.judges):
            began = time.perf_counter()
            columns[reward.name] = reward.grade(attempts, step=step)
            self.took[reward.name].append((time.perf_counter() - began) / max(1, len(attempts)))
            if reward is self._judge:
                verdicts = [_right(grade.value) for grade in columns[reward.name]]
                attempts = [replace(a, correct=right) for a, right in zip(attempts, verdicts, strict=True)]
        rows = zip(*(columns[reward.name] for reward in self.rewards), strict=True)
        return [self._total(attempt, grades) for attempt, grades in zip(attempts, rows, strict=True)]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task that lacks what a reward needs."""
        for reward in self.rewards:
            reward.check(tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the rewards say before training: a sandbox what it stops."""
        return tuple(reward.describe() for reward in self.rewards if isinstance(reward, Describes))

    def close(self) -> None:
        """End the rewards' worker processes."""
        for reward in self.rewards:
            reward.close()

    def _total(self, attempt: Attempt, grades: Sequence[Grade]) -> Score:
        """One attempt's score from its grades, which stand in the order of the rewards."""
        steps: dict[int, float] = {}
        turns = [0.0] * len(attempt.turn_rewards)
        parts: dict[str, float | None] = {}
        failed: dict[str, Grade] = {}
        notes: list[str] = []
        total: float | None = None
        for reward, given in zip(self.rewards, grades, strict=True):
            grade = _sound(given, attempt)
            parts[reward.name] = grade.value
            parts.update({f"{reward.name}/{key}": value for key, value in grade.metrics.items()})
            if grade.failure:
                failed[reward.name] = grade
            elif grade.value is not None:
                total = (total or 0.0) + reward.weight * grade.value
            for step in grade.steps:
                steps[step.end] = (steps[step.end] if step.end in steps else 0.0) + reward.weight * step.value
            for place, value in enumerate(grade.turns):
                turns[place] += reward.weight * value
            if grade.note:
                notes.append(f"{reward.name}: {grade.note}")
        if failed:
            return _unscored(failed, parts)
        if total is None:
            return Score(value=None, parts=parts, outcome=Outcome.GRADER_ERROR, note="no reward applies")
        return Score(
            value=total,
            parts=parts,
            outcome=Outcome.GRADER_GAVE_UP if any(grade.gave_up for grade in grades) else Outcome.FINISHED,
            correct=None if self._judge is None else _right(parts[self._judge.name]),
            note="; ".join(notes),
            steps=tuple(StepScore(end=end, value=steps[end]) for end in sorted(steps)),
            turns=tuple(turns),
        )


def _right(value: float | None) -> bool | None:
    """Whether a judge's value means that the answer is right."""
    return None if value is None else value >= 1


def _sound(grade: Grade, attempt: Attempt) -> Grade:
    """The grade, failed where a number is no use (one NaN would spoil its whole group) or a step is nowhere."""
    if grade.failure:
        return grade
    numbers = [step.value for step in grade.steps] + ([] if grade.value is None else [grade.value])
    wrong = [number for number in numbers if not abs(number) <= LARGEST]
    if wrong:
        return replace(grade, value=None, steps=(), failure=f"returned {wrong[0]}")
    ends = [0, *(step.end for step in grade.steps)]
    if any(left >= right for left, right in pairwise(ends)) or ends[-1] > len(attempt.answer):
        why = f"step ends {ends[1:]} do not ascend within the answer's {len(attempt.answer)} characters"
        return replace(grade, value=None, steps=(), failure=why)
    return grade


def _unscored(failed: Mapping[str, Grade], parts: Mapping[str, float | None]) -> Score:
    timed_out = any(grade.timed_out for grade in failed.values())
    return Score(
        value=None,
        parts=parts,
        outcome=Outcome.GRADER_TIMEOUT if timed_out else Outcome.GRADER_ERROR,
        note="; ".join(f"{name}: {grade.failure}" for name, grade in failed.items()),
    )
