"""What stages share that play tasks: the tasks that can be used, and who plays them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whet.config import ModelConfig, SamplingConfig, Source
from whet.data.faults import Dropped
from whet.envs.base import Attempt, Rubric, Task
from whet.envs.rubric import WeightedRubric
from whet.envs.single_turn import SingleTurn
from whet.pipeline.load_data import rubric, tasks, usable
from whet.pipeline.stage import Context, Policy, Seen, World
from whet.records import Score
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams
from whet.templates.base import Template

SHOWN = 3
"""Prompts that a check shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Playable:
    """The tasks of a stage, and what was left out of them."""

    tasks: Sequence[Task]
    lost: tuple[Dropped, ...]
    narrow: str = ""
    """How many prompts leave less room than an answer may have, and how much; empty where none does."""

    def describe(self) -> str:
        """`5,107 tasks; 2 rows dropped: ...; 3 tasks have room for 12 to 20 of 64 tokens`."""
        dropped = (d.describe() for d in self.lost if d.total)
        return "; ".join([f"{len(self.tasks):,} tasks", *dropped, *filter(None, [self.narrow])])


def playable(source: Source, model: ModelConfig, world: World, grading: WeightedRubric, *, max_tokens: int) -> Playable:
    """The tasks of a source, checked against the rewards and the model's template; no weights are loaded for it."""
    listed, unread = tasks(source)
    kept, unusable, rooms = usable(source, listed, grading, world.template(model), world.max_length(model))
    return Playable(tasks=kept, lost=(unread, unusable), narrow=_narrow(rooms, max_tokens))


def _narrow(rooms: Sequence[int], max_tokens: int) -> str:
    less = [room for room in rooms if room < max_tokens]
    if not less:
        return ""
    who = "1 task has" if len(less) == 1 else f"{len(less):,} tasks have"
    room = str(min(less)) if min(less) == max(less) else f"{min(less)} to {max(less)}"
    return f"{who} room for {room} of {max_tokens} tokens"


def look_at_tasks(context: Context[Any]) -> tuple[Seen, Playable]:
    """The tasks of a stage with `tasks` and `rewards`, and what a check shows of them."""
    config, world = context.config, context.world
    grading = rubric(config.tasks, config.rewards, world)
    try:
        found = playable(config.tasks, context.model, world, grading, max_tokens=config.sampling.max_tokens)
    finally:
        grading.close()
    return Seen(summary=found.describe(), prompts=[task.messages for task in found.tasks[:SHOWN]]), found


def check_tasks(context: Context[Any]) -> Seen:
    """The check of a stage that has tasks and rewards alone."""
    return look_at_tasks(context)[0]


@dataclass(frozen=True, slots=True)
class Ungraded:
    """A rubric that scores nothing, and says why."""

    why: str

    def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
        """No value."""
        return [Score(value=None, note=self.why) for _ in attempts]

    def close(self) -> None:
        """Nothing is open."""


def player(policy: Policy, grading: Rubric, sampling: SamplingConfig) -> Player:
    """Plays single-turn tasks with this policy."""
    return Player(
        sampler=policy.sampler,
        template=policy.template,
        environment=SingleTurn,
        rubric=grading,
        params=sampling_params(sampling, policy.template),
        max_length=policy.max_length,
    )


def sampling_params(config: SamplingConfig, template: Template) -> SamplingParams:
    """The recipe's sampling section, with the stop tokens that the template knows."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_ids=template.stop_ids,
    )
