r"""Mathematical equality with the gold answer: by rule where that is plain, else by math-verify in a worker.

math-verify hands answers to sympy, which some answers keep busy for ever, or until memory ends. So it runs in
processes that are killed at a deadline, with its own timeouts off. Such an attempt is unscored and counted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from whet.envs.base import Attempt, Grade, Task
from whet.envs.rewards.answers import as_number, final_answer, gold_answer, tidy
from whet.envs.rewards.plain import require
from whet.errors import DataError
from whet.sandbox.base import FailureKind, Result
from whet.sandbox.workers import WorkerPool

LONGEST_ANSWER = 2000
"""Characters. A longer final answer is wrong by rule, without being graded."""
MEMORY_MB = 2048
RIGHT, WRONG = Grade(value=1.0), Grade(value=0.0)


@dataclass(frozen=True, slots=True)
class _Question:
    """Gold and given answer, tidied: what a worker compares. Equal ones are asked once."""

    gold: str
    answer: str


class MathReward:
    r"""1 if the final answer equals the gold one, else 0. `gold` names the column; `answers` says what is understood.

    `check` refuses gold answers that are no mathematics; an attempt at such a task is unscored.
    """

    judges = True

    def __init__(self, *, name: str, weight: float, gold: str, deadline_s: float, workers: int | None = None) -> None:
        self.name, self.weight, self._gold = name, weight, gold
        self._pool = WorkerPool(
            "whet.envs.rewards.math_worker:load",
            workers=workers or os.cpu_count() or 1,
            deadline_s=deadline_s,
            memory_mb=MEMORY_MB,
        )

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt; the workers only see what no rule decides."""
        judged = [self._by_rule(attempt) for attempt in attempts]
        questions = list(dict.fromkeys(item for item in judged if isinstance(item, _Question)))
        results = self._pool.map([{"gold": q.gold, "answer": q.answer} for q in questions])
        grades = {question: _grade(result) for question, result in zip(questions, results, strict=True)}
        return [grades[item] if isinstance(item, _Question) else item for item in judged]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task whose gold answer is missing or cannot be read as mathematics."""
        golds = [tidy(gold_answer(require(task, self._gold, self.name))) for task in tasks]
        unsure = [(task, gold) for task, gold in zip(tasks, golds, strict=True) if as_number(gold) is None]
        for (task, gold), result in zip(unsure, self._pool.map([{"gold": gold} for _, gold in unsure]), strict=True):
            failure = _grade(result).failure
            if failure:
                raise DataError(f"task {task.id}: gold answer {gold[:80]!r} in column {self._gold!r}: {failure}")

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def _by_rule(self, attempt: Attempt) -> Grade | _Question:
        """The grade where it needs no mathematics: no answer, too long, the same text, two plain numbers."""
        try:
            gold = tidy(gold_answer(require(attempt.task, self._gold, self.name)))
        except DataError as error:
            return Grade(value=None, failure=str(error))
        answer = final_answer(attempt.answer)
        if not answer:
            return Grade(value=0.0, note="no answer found")
        if len(answer) > LONGEST_ANSWER:
            return Grade(value=0.0, note=f"the answer has more than {LONGEST_ANSWER} characters")
        answer = tidy(answer)
        wanted, given = as_number(gold), as_number(answer)
        if answer == gold or (wanted is not None and wanted == given):
            return RIGHT
        if wanted is not None and given is not None and wanted.denominator == given.denominator == 1:
            return WRONG
        return _Question(gold=gold, answer=answer)


def _grade(result: Result) -> Grade:
    """A worker's word as a grade. Its value is 1, 0, or null for a gold answer that it cannot read."""
    if result.failure is not None:
        timed_out = result.failure.kind is FailureKind.TIMEOUT
        return Grade(value=None, failure=result.failure.message, timed_out=timed_out)
    if result.value is None:
        return Grade(value=None, failure="the gold answer cannot be read as mathematics")
    return RIGHT if result.value == 1 else WRONG
