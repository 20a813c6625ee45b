"""The feed: where an algorithm takes its groups from, in the order and with the staleness that it is allowed.

Here at lag 0: `take` plays now, with the weights that were published last, so every group is on-policy. Which
tasks come next is derived from the position alone; the only state is that position, and it is in the checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from whet.envs.base import Task
from whet.errors import RewardError, TrainingError
from whet.records import Group, seed_of
from whet.rollouts.play import Played, Player

Keep = Callable[[Group], bool]

PATIENCE = 3
"""Takes in a row without a single score, after which the feed gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a `take` brought, and what it left out on the way (counted, never silent)."""

    groups: tuple[Group, ...]
    left_out: tuple[Group, ...]
    rounds: int
    rollout_s: float
    score_s: float

    @property
    def played(self) -> tuple[Group, ...]:
        """Every group that was played for this step."""
        return self.groups + self.left_out


@dataclass(kw_only=True)
class Feed:
    """Plays groups on demand from an endless, shuffled sequence of tasks."""

    player: Player
    tasks: Sequence[Task]
    samples: int
    seed: int
    hand_over: Callable[[int], None]
    """Brings the trainer's weights to the sampler under this version."""
    greedy: Player | None = None
    """Plays the same tasks once more at temperature 0, where a baseline wants that."""
    position: int = 0
    """Tasks handed out since the start of the stage."""
    _orders: dict[int, list[int]] = field(default_factory=dict)
    _unscored: int = 0

    def take(self, count: int, *, step: int, keep: Keep | None = None, rounds: int = 1) -> Taken:
        """`count` groups for this step; groups that `keep` refuses are left out and replaced for up to `rounds` rounds.

        Fewer than `count` may come back when the rounds are used up. Each round asks for no more than is missing,
        so nothing that was played is thrown away unseen. Raises `RewardError` where nothing was scored for the third
        time in a row.
        """
        groups: list[Group] = []
        left_out: list[Group] = []
        done, rollout_s, score_s = 0, 0.0, 0.0
        while len(groups) < count and done < rounds:
            tasks = [self._next() for _ in range(count - len(groups))]
            played = self._play(tasks, step=step, seed=seed_of(self.seed, step, done))
            for group in played.groups:
                (groups if keep is None or keep(group) else left_out).append(group)
            done, rollout_s, score_s = done + 1, rollout_s + played.rollout_s, score_s + played.score_s
        taken = Taken(groups=tuple(groups), left_out=tuple(left_out), rounds=done, rollout_s=rollout_s, score_s=score_s)
        self._refuse_unscored(taken.played)
        return taken

    def publish(self, version: int) -> None:
        """Hand the weights over, and verify that the sampler has them."""
        self.hand_over(version)
        if self.player.sampler.version != version:
            raise TrainingError(
                f"weights of version {version} were handed over, but the sampler has {self.player.sampler.version}"
            )

    def _play(self, tasks: Sequence[Task], *, step: int, seed: int) -> Played:
        played = self.player.play(tasks, self.samples, step=step, seed=seed)
        if self.greedy is None:
            return played
        once = self.greedy.play(tasks, 1, step=step, seed=seed)
        groups = (replace(g, greedy=one.episodes[0]) for g, one in zip(played.groups, once.groups, strict=True))
        return Played(
            groups=tuple(groups),
            rollout_s=played.rollout_s + once.rollout_s,
            score_s=played.score_s + once.score_s,
        )

    def _refuse_unscored(self, groups: Sequence[Group]) -> None:
        """One bad step is counted and gone; a grader that never answers would burn the machine for nothing."""
        self._unscored = 0 if any(group.scored for group in groups) else self._unscored + 1
        if self._unscored >= PATIENCE:
            last = groups[-1].episodes[-1]
            why = f"{last.outcome}: {last.score.note}"
            raise RewardError(f"no answer of the last {PATIENCE} steps could be scored; the last one: {why}")

    def _next(self) -> Task:
        epoch, place = divmod(self.position, len(self.tasks))
        self.position += 1
        if epoch not in self._orders:
            order = list(range(len(self.tasks)))
            random.Random(seed_of(self.seed, "epoch", epoch)).shuffle(order)
            self._orders = {epoch: order}
        return self.tasks[self._orders[epoch][place]]
