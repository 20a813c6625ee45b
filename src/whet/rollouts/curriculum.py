"""Which tasks come next: buckets of difficulty, rests for what is solved or hopeless, past prompts that still teach.

A curriculum knows tasks by their numbers. Everything that it does is derived from the seed, the step and three arrays
of one number per task: the share of right answers when it was last played, that share when the epoch began, and until
when it rests. The arrays are its whole state.

Legend: N tasks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whet.config.rl import SOLVED, CurriculumConfig
from whet.envs.base import Task
from whet.errors import DataError
from whet.records import Group, seed_of

UNKNOWN = 0.5
"""The share of right answers that a task which was never measured is ordered by (`order_by: solved`)."""
TABLES = ("rate", "rate_before", "rest_until")


@dataclass(kw_only=True, eq=False)
class Curriculum:
    """The arrays of one run."""

    config: CurriculumConfig
    tasks: int
    """N."""
    hardness: Sequence[float] = ()
    """By a column: one number for each task (`hardness_of`)."""
    rate: np.ndarray = field(init=False)
    """Share of right answers when the task was last played; NaN: never."""
    rate_before: np.ndarray = field(init=False)
    """The same when this epoch began: what its order is made of."""
    rest_until: np.ndarray = field(init=False)
    """First step in which the task may come again."""

    def __post_init__(self) -> None:
        self.rate, self.rate_before = np.full(self.tasks, np.nan), np.full(self.tasks, np.nan)
        self.rest_until = np.zeros(self.tasks, np.int64)

    def begin_epoch(self) -> None:
        """Order the next epoch by what is known now."""
        self.rate_before = self.rate.copy()

    def order(self, shuffled: Sequence[int]) -> list[int]:
        """These tasks with the easiest bucket first; inside a bucket in the order given."""
        if self.config.order_by is None:
            return list(shuffled)
        order = np.asarray(shuffled)
        known_N = self.rate_before if self.config.order_by == SOLVED else np.asarray(self.hardness)
        hardness = 1 - np.nan_to_num(known_N, nan=UNKNOWN) if self.config.order_by == SOLVED else known_N
        place = np.empty(len(order), np.int64)
        place[np.argsort(hardness[order], kind="stable")] = np.arange(len(order))
        bucket = place * self.config.buckets // len(order)
        return [int(task) for task in order[np.argsort(bucket, kind="stable")]]

    def rests(self, task: int, step: int) -> bool:
        """Whether the task is left out of this step."""
        return bool(step < self.rest_until[task])

    def resting(self, step: int) -> int:
        """How many tasks are left out of this step."""
        return int((step < self.rest_until).sum())

    def again(self, count: int, *, step: int, seed: int) -> list[int]:
        """Past tasks for this step: at most the configured share of `count`, drawn from those that still teach."""
        if not self.config.replay:
            return []
        some_right = np.flatnonzero((self.rate > 0) & (self.rate < 1) & (self.rest_until <= step))
        wanted = min(round(self.config.replay * count), len(some_right))
        drawn = random.Random(seed_of(seed, "again", step)).sample(range(len(some_right)), wanted)
        return [int(some_right[place]) for place in drawn]

    def observe(self, task: int, group: Group, step: int) -> None:
        """Record the results of a task; a group without verdicts changes nothing."""
        right = [episode.score.correct for episode in group.scored if episode.score.correct is not None]
        if not right:
            return
        rate = self.rate[task] = sum(right) / len(right)
        low, high = self.config.skip_below, self.config.skip_above
        rests = (high is not None and rate >= high) or (low is not None and rate <= low)
        self.rest_until[task] = step + 1 + self.config.skip_steps if rests else 0

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Copies of the arrays, for a step's state."""
        return {name: getattr(self, name).copy() for name in TABLES}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which may hold other numbers too."""
        self.__post_init__()
        for name in TABLES:
            getattr(self, name)[:] = state[name]


def hardness_of(tasks: Sequence[Task], config: CurriculumConfig | None) -> list[float]:
    """Each task's number in the column that a curriculum goes by; none where it goes by none.

    Raises `DataError`, naming the task, where that column has no number.
    """
    if config is None or config.order_by is None or config.order_by == SOLVED:
        return []
    found = []
    for task in tasks:
        value = task.columns[config.order_by] if config.order_by in task.columns else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            has = ", ".join(sorted(task.columns)) or "none"
            raise DataError(
                f"task {task.id}: curriculum.order_by is {config.order_by!r}, and the row has no number there; its "
                f"columns: {has}"
            )
        found.append(float(value))
    return found
