"""The policy is the judge: its verdict is the known one."""

from __future__ import annotations

from whet.envs.base import Attempt, Grade
from whet.envs.judges.ask import read_verdict
from whet.envs.rewards.answers import after_thinking
from whet.envs.rewards.plain import require


def right_verdict(attempt: Attempt, *, gold: str) -> Grade:
    """1 if the last line is `Verdict: X` with the word of the gold column, and 0 for any other word or none."""
    expected = str(require(attempt.task, gold, "verdict"))
    return Grade(value=float(read_verdict(after_thinking(attempt.answer), [expected]) is not None))
