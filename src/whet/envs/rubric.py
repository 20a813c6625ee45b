"""A rubric: named rewards, weighed and added. What could not be graded is unscored, never zero.

Rewards that grade each attempt by itself can be asked ahead, for some attempts while others are still sampled. The
scores are those of one call for all: what such a reward said is used where the attempt is the one that it saw, and
whose fault a lost grade is, is decided at the end.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

from whet.envs.base import Attempt, Grade, Reward, Separate, Task
from whet.errors import ConfigError
from whet.records import Outcome, Score, StepScore

Ahead = dict[tuple[str, bool | None], Grade]
"""Grades that are known before the others, by the reward's name and the judge's verdict that it knew."""
SLOW_S = 2e-3
"""Seconds an answer from which a reward is asked ahead; a faster one costs less in one call."""
LARGEST = 1e30
"""A value beyond it (or NaN) is a grader's mistake: sums and squares of such numbers are not finite in float32."""


@runtime_checkable
class Describes(Protocol):
    """A reward with a note for the start of training."""

    def describe(self) -> str:
        """One line."""


class WeightedRubric:
    """score = sum of weight * value over the rewards that apply to an attempt.

    One failed reward leaves the whole attempt unscored: a sum without one of its parts is another quantity.
    `Score.correct` is the verdict of the first reward that judges.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        for name, count in Counter(reward.name for reward in rewards).items():
            if count > 1:
                raise ConfigError(f"rewards: {count} of them are named {name!r}; give each its own name")
        self.rewards = tuple(rewards)
        self.took: defaultdict[str, list[float]] = defaultdict(list)
        """By reward: the seconds that an answer took in each call."""
        self._judge = next((reward for reward in rewards if reward.judges), None)

    def score(self, attempts: Sequence[Attempt], *, step: int, ahead: Sequence[Ahead] = ()) -> list[Score]:
        """One score for each attempt. `step` is what reward functions see as the trainer's step.

        `ahead`: for each attempt what `ahead` gave, or nothing.
        """
        columns: dict[str, list[Grade]] = {}
        for reward in self._ordered:
            known = [
                said.get((reward.name, a.correct))
                for said, a in zip(ahead or [{}] * len(attempts), attempts, strict=True)
            ]
            columns[reward.name] = self._asked(reward, attempts, known, step)
            if reward is self._judge:
                attempts = _judged(attempts, columns[reward.name])
        rows = zip(*(columns[reward.name] for reward in self.rewards), strict=True)
        return [self._total(attempt, grades) for attempt, grades in zip(attempts, rows, strict=True)]

    @property
    def slow(self) -> bool:
        """Whether asking ahead saves time: some reward that can be asked is slow, or was not asked yet.

        None can be where the verdict, which all of them may want to know, takes all answers.
        """
        if self._judge is not None and not _alone(self._judge):
            return False
        return any(_alone(each) and self.took.get(each.name, [SLOW_S])[-1] >= SLOW_S for each in self.rewards)

    def ahead(self, attempts: Sequence[Attempt], *, step: int) -> list[Ahead]:
        """For each attempt its grades by the rewards that grade it alone, by their name and the judge's verdict."""
        found: list[Ahead] = [{} for _ in attempts]
        for reward in self._ordered:
            if isinstance(reward, Separate) and reward.alone:
                with self._timed(reward, attempts):
                    grades = reward.each(attempts, step=step)
                for said, attempt, grade in zip(found, attempts, grades, strict=True):
                    said[reward.name, attempt.correct] = grade
                attempts = _judged(attempts, grades) if reward is self._judge else attempts
        return found

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task that lacks what a reward needs."""
        for reward in self.rewards:
            reward.check(tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the rewards for the start of training: what a sandbox stops."""
        return tuple(reward.describe() for reward in self.rewards if isinstance(reward, Describes))

    def close(self) -> None:
        """End the rewards' worker processes."""
        for reward in self.rewards:
            reward.close()

    @property
    def _ordered(self) -> list[Reward]:
        """Those that judge first: the others know their verdict."""
        return sorted(self.rewards, key=lambda reward: not reward.judges)

    def _asked(
        self, reward: Reward, attempts: Sequence[Attempt], known: Sequence[Grade | None], step: int
    ) -> list[Grade]:
        """A reward's grades of all attempts; it is asked for those that are not known."""
        if not isinstance(reward, Separate) or all(grade is None for grade in known):
            with self._timed(reward, attempts):
                return reward.grade(attempts, step=step)
        said: Iterator[Grade] = iter(())
        if others := [attempt for attempt, grade in zip(attempts, known, strict=True) if grade is None]:
            with self._timed(reward, others):
                said = iter(reward.each(others, step=step))
        return reward.settle(attempts, [next(said) if grade is None else grade for grade in known], step=step)

    @contextmanager
    def _timed(self, reward: Reward, attempts: Sequence[Attempt]) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.took[reward.name].append((time.perf_counter() - began) / max(1, len(attempts)))

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


def _alone(reward: Reward) -> bool:
    """Whether it grades each attempt by itself."""
    return isinstance(reward, Separate) and reward.alone


def _judged(attempts: Sequence[Attempt], grades: Sequence[Grade]) -> list[Attempt]:
    """The attempts with what the judge said of each."""
    return [replace(a, correct=_right(grade.value)) for a, grade in zip(attempts, grades, strict=True)]


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
