"""A judge of equivalence behind the rules: asked only where the gold is words and no rule finds them in the answer.

What rules decide stays decided: numbers, formulas, dates, letters, yes or no, and the same words are never asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from whet.envs.base import Attempt, Grade, Task
from whet.envs.judges.ask import Opinion
from whet.envs.judges.judge import Judge
from whet.envs.rewards.math import MathReward


@dataclass(frozen=True, slots=True, kw_only=True)
class EquivalenceReward:
    """The rules' verdict, or 1 if the judge says in both orders that the answer says what one of the golds says.

    Without an opinion of the judge an answer that no rule accepts is ungraded. Metrics: `judged`, the share that was
    asked about, and `judged_right`, of all answers.
    """

    name: str
    weight: float
    rules: MathReward
    judge: Judge
    judges: bool = True

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt."""
        grades = self.rules.grade(attempts, step=step)
        asked = [
            (place, pair)
            for place, (attempt, grade) in enumerate(zip(attempts, grades, strict=True))
            if grade.value == 0 and not grade.gave_up
            for pair in self.rules.in_words(attempt)
        ]
        opinions = self.judge.same([attempts[place].task.messages for place, _ in asked], [pair for _, pair in asked])
        judged: dict[int, list[Opinion]] = {}
        for (place, _), opinion in zip(asked, opinions, strict=True):
            judged.setdefault(place, []).append(opinion)
        return [
            _judged(judged[place]) if place in judged else replace(grade, metrics={"judged": 0.0, "judged_right": 0.0})
            for place, grade in enumerate(grades)
        ]

    def check(self, tasks: Sequence[Task]) -> None:
        """As the rules do."""
        self.rules.check(tasks)

    def close(self) -> None:
        """End the rules' workers, and let the judge go."""
        self.rules.close()
        self.judge.close()


def _judged(opinions: Sequence[Opinion]) -> Grade:
    """Right by one gold is right; else what could not be judged is no verdict."""
    right = any(opinion.value is not None and opinion.value > 0.5 for opinion in opinions)
    lost = next((opinion for opinion in opinions if opinion.value is None), None)
    metrics = {"judged": 1.0, "judged_right": float(right)}
    if right or lost is None:
        return Grade(value=float(right), metrics=metrics)
    return Grade(value=None, failure=lost.failure, timed_out=lost.timed_out, metrics=metrics)
