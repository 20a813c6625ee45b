"""Answers that are words: the gold one word for word, or of a judge in training the right verdict."""

from __future__ import annotations

from whet.envs.base import Attempt, Grade, Task, graded, require
from whet.envs.judges.ask import read_verdict
from whet.envs.rewards.answers import after_thinking, gold_answer, marked_answer
from whet.errors import DataError


def exact(attempt: Attempt, *, gold: str) -> Grade:
    """1 if what the completion marks as its answer (or all of it, if it marks nothing) equals the gold column.

    Runs of spaces and case aside. Raises `DataError` where the task has no such column, or one that no text equals.
    """
    expected = exact_gold(attempt.task, gold)
    marked = marked_answer(attempt.answer)
    given = after_thinking(attempt.answer) if marked is None else marked
    words, wanted = (text.casefold().split() for text in (given, expected))
    return graded(bool(words) and words == wanted, given, expected)


def exact_gold(task: Task, column: str) -> str:
    """The text that an answer must equal. Raises `DataError`, with the remedy, where no answer can."""
    value = require(task, column, "exact")
    where = f"task {task.id}: gold answer {str(value)[:80]!r} in column {column!r}"
    if isinstance(value, float) and value.is_integer():
        raise DataError(f"{where}: is a decimal number, which no answer repeats as {value!r}; use kind: math")
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: is a {type(value).__name__}, not a text; use kind: answer for several golds")
    text = gold_answer(value)
    if not text:
        raise DataError(f"{where}: is empty")
    return text


def right_verdict(attempt: Attempt, *, gold: str) -> Grade:
    """1 if the last line is `Verdict: X` with the word of the gold column, and 0 for any other word or none."""
    expected = str(require(attempt.task, gold, "verdict"))
    return Grade(value=float(read_verdict(after_thinking(attempt.answer), [expected]) is not None))
