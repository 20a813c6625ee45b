"""The scorers of reasoning-gym's data sets (extra `envs`), unmodified, in a worker process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from whet.envs.base import Attempt, Task
from whet.envs.rewards.function import FunctionReward
from whet.errors import DataError, RewardError
from whet.records import Message

GRIDS = {"arc_agi", "rearc"}
"""Their scorers compare tuples, which are lists in a file."""


class GymReward(FunctionReward):
    """The score by the scorer of the row's data set, from 0 to 1. Raises `RewardError` where the library is missing."""

    def __init__(self, *, name: str, weight: float) -> None:
        if find_spec("reasoning_gym") is None:
            raise RewardError("verifier reasoning_gym: the library is not installed; pip install 'whet[envs]'")
        super().__init__(name=name, weight=weight, path=f"{__name__}:score", deadline_s=10.0, judges=True)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task whose own answer, where it has one, does not score 1."""
        for task in tasks:
            gold = task.columns.get("answer")
            said = Message(role="assistant", content=f"<answer>{'' if gold is None else gold}</answer>")
            attempt = Attempt(task=task, messages=(said,))
            grade = self.grade([attempt], step=0)[0]
            if grade.failure or (gold is not None and grade.value != 1):
                why = grade.failure or f"scores {grade.value:g}, not 1"
                raise DataError(f"task {task.id}: its own answer {str(gold)[:60]!r}: {why}; correct the row")


def score(answer: str, entry: dict[str, Any]) -> float:
    """The worker's side: what `score_answer` of the entry's data set gives."""
    name = entry["metadata"]["source_dataset"]
    return float(_scorer(name)(answer, _frozen(entry) if name in GRIDS else entry))


@cache
def _scorer(name: str) -> Any:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(name)


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(each) for key, each in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
