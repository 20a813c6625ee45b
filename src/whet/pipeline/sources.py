"""Where a stage's rows come from: files, the hub or a task family, as conversations to imitate or tasks to play."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from whet.config import GeneratedConfig, RewardConfig, Source
from whet.data.base import Conversation, Origin
from whet.data.faults import Dropped
from whet.data.formats import load_conversations, load_prompts
from whet.envs.base import Task
from whet.envs.library import Family, family
from whet.envs.rewards.build import build_rubric
from whet.envs.rubric import WeightedRubric


@dataclass(frozen=True)
class GeneratedTasks(Sequence[Task]):
    """The first `count` tasks of a family, made when they are asked for."""

    family: Family
    count: int

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return [self.family.task(i) for i in range(self.count)[index]]
        return self.family.task(range(self.count)[index])


def conversations(source: Source) -> tuple[Sequence[Conversation], Dropped]:
    """What to imitate, and which rows could not be used."""
    if not isinstance(source, GeneratedConfig):
        return load_conversations(source)
    generator = family(source)
    return [_demonstration(generator, source, index) for index in range(source.count)], Dropped()


def tasks(source: Source) -> tuple[Sequence[Task], Dropped]:
    """What to play, and which rows could not be used."""
    if isinstance(source, GeneratedConfig):
        return GeneratedTasks(family(source), source.count), Dropped()
    prompts, dropped = load_prompts(source)
    return [Task(id=str(p.origin), messages=p.messages, columns=p.columns) for p in prompts], dropped


def rubric(source: Source, rewards: Sequence[RewardConfig], played: Sequence[Task]) -> WeightedRubric:
    """The rewards of a stage; gold answers that cannot be understood are an error here and not a silent zero later."""
    built = build_rubric(rewards, family(source).verify if isinstance(source, GeneratedConfig) else None)
    if not isinstance(source, GeneratedConfig):
        try:
            built.check(played)
        except BaseException:
            built.close()
            raise
    return built


def _demonstration(generator: Family, source: GeneratedConfig, index: int) -> Conversation:
    origin = Origin(source=source.generate, line=index + 1)
    shown = generator.demonstration(index)
    if isinstance(shown, str):
        return Conversation(origin=origin, text=shown)
    return Conversation(origin=origin, messages=shown)
