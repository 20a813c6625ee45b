"""The feed: where an algorithm takes its groups from, in the order and with the staleness that it is allowed.

Here at lag 0: `take` plays now, with the weights that were published last, so every group is on-policy (a feed that
plays ahead is in `rollouts.ledger`). Which tasks come next is derived from the position, and from what a curriculum has
measured where there is one. Position and tables are the whole state, and they are in the checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from whet.envs.base import Task
from whet.errors import RewardError, RunError, TrainingError
from whet.records import Group, State, seed_of
from whet.rollouts.curriculum import Curriculum
from whet.rollouts.play import Played, Player
from whet.sampling.base import run

Keep = Callable[[Group], bool]
Place = tuple[int | str, int]
"""A position in the order of the stage, which seeds follow from, and the number of a task."""

PATIENCE = 3
"""Takes in a row without a single score, after which the feed gives up; a stage of fewer steps ends before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a `take` brought, and what it left out on the way (counted, never silent)."""

    groups: tuple[Group, ...]
    left_out: tuple[Group, ...]
    rounds: int
    rollout_s: float
    score_s: float
    again: int = 0
    """Groups of past prompts that a curriculum replays."""
    resting: int = 0
    """Tasks that a curriculum left out of this step."""
    gap: float | None = None
    """Of asynchronous rollouts: the log-probability gap of sampler and trainer at one version (`ApartSampler.gaps`)."""

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
    steps: int
    """Takes of the whole stage: one that ends without a single score has not done its work."""
    seed: int
    hand_over: Callable[[int], None]
    """Weight sync: gives the sampler the trainer's weights under this version."""
    greedy: Player | None = None
    """Plays the same tasks once more at temperature 0, where a baseline wants that."""
    curriculum: Curriculum | None = None
    position: int = 0
    """Tasks handed out or passed over since the start of the stage."""
    _orders: dict[int, list[int]] = field(default_factory=dict)
    _unscored: int = 0
    """Takes in a row without a single score."""

    def take(self, count: int, *, step: int, keep: Keep | None = None, rounds: int = 1) -> Taken:
        """`count` groups for this step; groups that `keep` refuses are left out and replaced for up to `rounds` rounds.

        Fewer than `count` may come back when the rounds are used up. Each round asks for no more than is missing,
        so nothing that was played is thrown away unseen. Raises `RewardError` where nothing was scored for the third
        time in a row, or in the whole stage.
        """
        groups: list[Group] = []
        left_out: list[Group] = []
        done, rollout_s, score_s = 0, 0.0, 0.0
        resting = self.curriculum.resting(step) if self.curriculum is not None else 0
        again = 0
        while len(groups) < count and done < rounds:
            places, played = self._round(count - len(groups), step, first=not done)
            for (position, number), group in zip(places, played.groups, strict=True):
                (groups if keep is None or keep(group) else left_out).append(group)
                again += isinstance(position, str)
                if self.curriculum is not None:
                    self.curriculum.observe(number, group, step)
            done, rollout_s, score_s = done + 1, rollout_s + played.rollout_s, score_s + played.score_s
        taken = Taken(
            groups=tuple(groups), left_out=tuple(left_out), rounds=done, rollout_s=rollout_s, score_s=score_s,
            again=again, resting=resting,
        )  # fmt: skip
        self._refuse_unscored(taken.played)
        return taken

    @property
    def state(self) -> State:
        """What `restore` goes on from, for a step's state."""
        tables = self.curriculum.state if self.curriculum is not None else {}
        return {"position": float(self.position), "unscored_takes": float(self._unscored), **tables}

    def restore(self, state: State) -> None:
        """Stand where the feed stood that gave `state`. Raises `RunError` where that one had played ahead."""
        if left := state.get("admitted", 0.0) - state.get("trained", 0.0):
            raise RunError(
                f"the checkpoint was written with a lag, and {left:g} groups of later steps were begun, which would "
                "never be trained; go on with that lag, or --restart the stage"
            )
        self._stand(state)

    def _stand(self, state: State) -> None:
        self.position, self._unscored = int(state["position"]), int(state["unscored_takes"])
        self._orders.clear()
        if self.curriculum is not None:
            self.curriculum.restore(state)

    def publish(self, version: int) -> None:
        """Hand the weights over, and verify that the sampler has them."""
        self.hand_over(version)
        if self.player.sampler.version != version:
            raise TrainingError(
                f"weights of version {version} were handed over, but the sampler has {self.player.sampler.version}"
            )

    def _round(self, count: int, step: int, *, first: bool) -> tuple[Sequence[Place], Played]:
        """So many groups, played now, and where they stand; `first` of the step."""
        places = self._places(count, step, again=first)
        return places, run(self._play(places, step))

    def _places(self, count: int, step: int, *, again: bool) -> list[Place]:
        """The next so many; `again`: with past prompts among them, where a curriculum brings some back."""
        known = self.curriculum.again(count, step=step, seed=self.seed) if again and self.curriculum else []
        places: list[Place] = [(f"again {step} {task}", task) for task in known]
        return places + [self._next(step) for _ in range(count - len(places))]

    async def _play(self, places: Sequence[Place], step: int, version: int | None = None) -> Played:
        """Groups of these tasks, each at its position in the order of the whole stage, which its seeds follow from."""
        tasks, positions = [self.tasks[number] for _, number in places], [position for position, _ in places]
        how: dict[str, Any] = {"step": step, "seed": self.seed, "positions": positions, "version": version}
        played = await self.player.play_async(tasks, self.samples, **how)
        if self.greedy is None:
            return played
        once = await self.greedy.play_async(tasks, 1, **how)
        groups = (replace(g, greedy=one.episodes[0]) for g, one in zip(played.groups, once.groups, strict=True))
        return Played(
            groups=tuple(groups), rollout_s=played.rollout_s + once.rollout_s, score_s=played.score_s + once.score_s
        )

    def _refuse_unscored(self, groups: Sequence[Group]) -> None:
        """Raise `RewardError` after several steps without a score: a broken grader would waste the machine."""
        self._unscored = 0 if any(group.scored for group in groups) else self._unscored + 1
        if self._unscored >= min(PATIENCE, self.steps):
            last = groups[-1].episodes[-1]
            why = f"{last.outcome}: {last.score.note}"
            steps = "step" if self._unscored == 1 else f"{self._unscored} steps"
            raise RewardError(f"no answer of the last {steps} could be scored; the last one: {why}")

    def _next(self, step: int) -> tuple[int, int]:
        """Position and number of the next task; where all of them rest, the last one looked at."""
        for _ in range(len(self.tasks)):
            position, task = self.position, self._at(self.position)
            self.position += 1
            if self.curriculum is None or not self.curriculum.rests(task, step):
                break
        return position, task

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.tasks))
        if epoch not in self._orders:
            order = list(range(len(self.tasks)))
            random.Random(seed_of(self.seed, "epoch", epoch)).shuffle(order)
            if self.curriculum is not None:
                if place == 0:
                    self.curriculum.begin_epoch()
                order = self.curriculum.order(order)
            self._orders = {epoch: order}
        return self._orders[epoch][place]
