"""The final answer is the gold one, word for word."""

from __future__ import annotations

from whet.envs.base import Attempt, Grade
from whet.envs.rewards.answers import after_thinking, gold_answer, marked_answer, same_words
from whet.envs.rewards.plain import require


def exact(attempt: Attempt, *, gold: str) -> Grade:
    """1 if what the completion marks as its answer (or all of it, if it marks nothing) equals the gold column.

    Runs of spaces and case aside. Raises `DataError` where the task has no such column.
    """
    expected = gold_answer(require(attempt.task, gold, "exact"))
    marked = marked_answer(attempt.answer)
    given = after_thinking(attempt.answer) if marked is None else marked
    return Grade(value=float(bool(given.strip()) and same_words(given, expected)))
