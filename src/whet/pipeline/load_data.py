"""Where a stage's rows come from: files, the hub or a task family, as conversations, comparisons or tasks to play."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress

from whet.config import GeneratedConfig, RewardConfig, Source
from whet.data.base import Comparison, Conversation, Judged, Origin, Rated, Stepwise
from whet.data.faults import BadRow, Dropped, Rejects
from whet.data.formats import load_tasks, read_conversations
from whet.data.preferences import load_comparisons, load_judged, load_rated
from whet.data.sources import Reading, digest_of
from whet.data.stepwise import load_stepwise
from whet.envs import families
from whet.envs.base import Attempt, Task
from whet.envs.clients import Models
from whet.envs.families.base import OBJECTIVES, Family
from whet.envs.rewards.build import build_rubric
from whet.envs.rubric import WeightedRubric
from whet.envs.tools.play import Environments
from whet.errors import DataError
from whet.records import Message
from whet.templates.base import Template

GENERATED = 256
"""Generated prompts whose lengths are looked at: all are made by one rule."""


def source_digest(source: Source) -> str:
    """SHA-256 of the rows that a source gives, wherever they lie; reads files as bytes, and parses nothing.

    Raises `DataError` where there is no such source.
    """
    if not isinstance(source, GeneratedConfig):
        return digest_of(source)
    asked = f"{source.model_dump_json(exclude={'weight'})} version {families.FAMILIES[source.generate].version}"
    return hashlib.sha256(asked.encode()).hexdigest()


def conversations(source: Source) -> Reading[Conversation]:
    """What to imitate, not read yet."""
    if not isinstance(source, GeneratedConfig):
        return read_conversations(source)
    generator = families.family(source)
    return Reading(
        examples=(_demonstration(generator, source, index) for index in range(source.count)),
        rejects=Rejects("error"),
        sources=[source.generate],
        digest=source_digest(source),
    )


def comparisons(source: Source) -> tuple[Sequence[Comparison], Dropped]:
    """Answers in order of preference, and which rows could not be used."""
    if not isinstance(source, GeneratedConfig):
        return load_comparisons(source)
    generator = families.family(source)
    return [_ranked(generator, source, index) for index in range(source.count)], Dropped()


def judged(source: Source) -> tuple[Sequence[Judged], Dropped]:
    """Answers that are good or bad, and which rows could not be used.

    Of generated comparisons the best and the worst answer in turn.
    """
    if not isinstance(source, GeneratedConfig):
        return load_judged(source)
    generator = families.family(source)
    ranked = (_ranked(generator, source, index) for index in range(source.count))
    return [
        Judged(origin=each.origin, prompt=each.prompt, answer=each.answers[-(index % 2)], good=index % 2 == 0)
        for index, each in enumerate(ranked)
    ], Dropped()


def rated(source: Source, objectives: Sequence[str]) -> tuple[Sequence[Rated], Dropped]:
    """Answers with ratings by these objectives, and which rows could not be used.

    Of each generated comparison one answer, its places in turn.
    """
    if not isinstance(source, GeneratedConfig):
        return load_rated(source, objectives)
    if unknown := [name for name in objectives if name not in OBJECTIVES]:
        raise DataError(
            f"objectives: generated answers are not rated by {unknown[0]}; they are by {', '.join(OBJECTIVES)}"
        )
    generator = families.family(source)
    return [_rated(generator, source, index, objectives) for index in range(source.count)], Dropped()


def tasks(source: Source) -> tuple[Sequence[Task], Dropped]:
    """What to play, and which rows could not be used."""
    if isinstance(source, GeneratedConfig):
        return families.family(source), Dropped()
    return load_tasks(source)


def rubric(source: Source, rewards: Sequence[RewardConfig], models: Models) -> WeightedRubric:
    """The rewards of a stage; `models` builds the clients of the models that they ask."""
    return build_rubric(rewards, families.family(source) if isinstance(source, GeneratedConfig) else None, models)


def usable(
    source: Source,
    listed: Sequence[Task],
    grading: WeightedRubric,
    template: Template,
    max_length: int,
    environment: Environments | None = None,
) -> tuple[Sequence[Task], Dropped, list[int]]:
    """The tasks whose gold answers the rewards understand and whose prompts leave room for an answer, and that room.

    What is wrong with a row is an error here, or dropped and counted, and never a silent zero in training.
    """
    tools = () if environment is None else environment.tools
    if isinstance(source, GeneratedConfig):  # made by us: every gold answer is understood, every prompt short
        if environment is not None:
            environment.check(listed[0])
        few = [len(template.prompt(task.messages, tools)) for task in listed[:GENERATED]]
        return listed, Dropped(), [_room(max(few), max_length)]
    rejects, kept, rooms = Rejects(source.on_bad_row), [], []
    sound = False
    with suppress(DataError):  # all at once, which is faster; where one is wrong, the loop says which
        grading.check(listed)
        sound = True
    for task in listed:
        try:
            if not sound:
                grading.check([task])
            if environment is not None:
                environment.check(task)
            room = _room(len(template.prompt(task.messages, tools, settings=task.settings)), max_length)
            kept.append(task)
            rooms.append(room)
        except DataError as error:
            rejects.add(_as_bad_row(task, error))
    if not kept:
        raise DataError(f"{source.path}: no task can be used; {rejects.dropped.describe()}")
    return kept, rejects.dropped, rooms


def _room(prompt_tokens: int, max_length: int) -> int:
    if prompt_tokens >= max_length:
        raise DataError(
            f"the prompt has no room for an answer; it has {prompt_tokens} tokens and the model attends to {max_length}"
        )
    return max_length - prompt_tokens


def _as_bad_row(task: Task, error: DataError) -> BadRow:
    what, _, remedy = str(error).removeprefix(f"task {task.id}: ").partition("; ")
    return BadRow(task.id, "", what, remedy)


def stepwise(source: Source) -> tuple[Sequence[Stepwise], Dropped]:
    """Answers with graded steps, and which rows could not be used."""
    if isinstance(source, GeneratedConfig):
        raise DataError("no task family writes graded steps; a stage of kind step_labels makes them from rollouts")
    return load_stepwise(source)


def _ranked(generator: Family, source: GeneratedConfig, index: int) -> Comparison:
    answers = tuple((Message(role="assistant", content=text),) for text in generator.ranking(index))
    origin = Origin(source=source.generate, line=index + 1)
    return Comparison(origin=origin, prompt=generator.task(index).messages, answers=answers)


def _rated(generator: Family, source: GeneratedConfig, index: int, objectives: Sequence[str]) -> Rated:
    compared = _ranked(generator, source, index)
    answer = compared.answers[index % source.answers]
    written = Attempt(task=generator.task(index), messages=answer)
    ratings = generator.ratings(written)
    return Rated(
        origin=compared.origin,
        prompt=compared.prompt,
        answer=answer,
        ratings={name: ratings[name] for name in objectives},
    )


def _demonstration(generator: Family, source: GeneratedConfig, index: int) -> Conversation:
    origin = Origin(source=source.generate, line=index + 1)
    shown = generator.demonstration(index)
    if isinstance(shown, str):
        return Conversation(origin=origin, text=shown)
    return Conversation(origin=origin, messages=shown)
