"""Which tasks come next: pools of difficulty, rests for what is solved or hopeless, past prompts that still teach.

A curriculum knows tasks by their numbers. Everything that it does is derived from the seed, the step and three small
tables: the share of right answers when a task was last played, that share when the epoch began, and until when a task
rests. The tables are its whole state, as numbers under names of their own in a step's state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whet.config.curriculum import SOLVED, CurriculumConfig
from whet.envs.base import Task
from whet.errors import DataError
from whet.records import Group, seed_of

UNKNOWN = 0.5
"""What a task that was never measured counts for in the order by `solved`."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The tables of one run."""

    config: CurriculumConfig
    hardness: Sequence[float] = ()
    """By a column: one number for each task (`hardness_of`)."""
    rate: dict[int, float] = field(default_factory=dict)
    """Share of right answers when the task was last played."""
    rate_before: dict[int, float] = field(default_factory=dict)
    """The same when this epoch began: what its order is made of."""
    rest_until: dict[int, int] = field(default_factory=dict)
    """First step in which the task may come again."""

    def begin_epoch(self) -> None:
        """Order the next epoch by what is known now."""
        self.rate_before.update(self.rate)

    def order(self, shuffled: Sequence[int]) -> list[int]:
        """These tasks with the easiest pool first; inside a pool in the order given."""
        if self.config.by is None:
            return list(shuffled)
        ranked = sorted(shuffled, key=self._hardness)
        pool = {task: place * self.config.pools // len(ranked) for place, task in enumerate(ranked)}
        return sorted(shuffled, key=lambda task: pool[task])

    def rests(self, task: int, step: int) -> bool:
        """Whether the task is left out of this step."""
        return task in self.rest_until and step < self.rest_until[task]

    def resting(self, step: int) -> int:
        """How many tasks are left out of this step."""
        return sum(step < until for until in self.rest_until.values())

    def again(self, count: int, *, step: int, seed: int) -> list[int]:
        """Past tasks for this step: at most the configured share of `count`, drawn from those that still teach."""
        some_right = sorted(t for t, rate in self.rate.items() if 0 < rate < 1 and not self.rests(t, step))
        wanted = min(round(self.config.replay * count), len(some_right))
        return random.Random(seed_of(seed, "again", step)).sample(some_right, wanted)

    def observe(self, task: int, group: Group, step: int) -> None:
        """Note what became of a task; a group in which nothing was judged says nothing."""
        right = [episode.score.correct for episode in group.scored if episode.score.correct is not None]
        if not right:
            return
        rate = self.rate[task] = sum(right) / len(right)
        low, high = self.config.rest_below, self.config.rest_above
        self.rest_until.pop(task, None)
        if (high is not None and rate >= high) or (low is not None and rate <= low):
            self.rest_until[task] = step + 1 + self.config.rest_steps

    @property
    def state(self) -> dict[str, float]:
        """The tables as numbers for a step's state."""
        return {f"{name}/{task}": float(value) for name, table in self._tables for task, value in table.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from `state`, which may hold other numbers too."""
        for name, table in self._tables:
            table.clear()
            found = {int(key.removeprefix(f"{name}/")): v for key, v in state.items() if key.startswith(f"{name}/")}
            table.update(found)  # type: ignore[arg-type]

    @property
    def _tables(self) -> tuple[tuple[str, dict[int, float] | dict[int, int]], ...]:
        return (("rate", self.rate), ("rate_before", self.rate_before), ("rest_until", self.rest_until))

    def _hardness(self, task: int) -> float:
        if self.config.by == SOLVED:
            return 1 - (self.rate_before[task] if task in self.rate_before else UNKNOWN)
        return self.hardness[task]


def hardness_of(tasks: Sequence[Task], config: CurriculumConfig | None) -> list[float]:
    """Each task's number in the column that a curriculum goes by; none where it goes by none.

    Raises `DataError`, naming the task, where that column has no number.
    """
    if config is None or config.by is None or config.by == SOLVED:
        return []
    found = []
    for task in tasks:
        value = task.columns[config.by] if config.by in task.columns else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            has = ", ".join(sorted(task.columns)) or "none"
            raise DataError(
                f"task {task.id}: curriculum.by is {config.by!r}, and the row has no number there; its columns: {has}"
            )
        found.append(float(value))
    return found
