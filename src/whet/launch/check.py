"""`whet check`: everything that can be wrong with the data, before a model is loaded; a run looks ahead with the same.

Rows go through the same gate as in a run, gold answers through the same rewards, prompts through the same template;
a few rows are shown with their loss mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.config import (
    AgreementStage,
    CompareStage,
    GeneratedConfig,
    ModelConfig,
    PreferenceStage,
    QuestionsStage,
    ReviseStage,
    RewardModelStage,
    RLStage,
    SFTStage,
    Stage,
)
from whet.config.judge import ChatConfig, EndpointChat, LocalChat, ScriptedChat
from whet.config.loading import Loaded
from whet.config.references import children, references, with_references
from whet.envs.base import Task
from whet.envs.judges.judge import build_wording
from whet.envs.judges.principles import read_principles
from whet.envs.judges.questions import questions
from whet.files import is_sealed
from whet.launch.world import LocalWorld
from whet.pipeline.lessons import lessons
from whet.pipeline.preference_stage import gate_preferences
from whet.pipeline.rl_stage import playable, pretraining_rows
from whet.pipeline.run import Run
from whet.pipeline.sft_stage import gate, gate_sets
from whet.pipeline.sources import comparisons, rubric, tasks
from whet.records import seed_of
from whet.templates.base import Template
from whet.training.gate import Segment, segments

SHOWN = 3
"""Rows or prompts shown of each stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheck:
    """What the gate says of one stage's rows or tasks."""

    stage: str
    kind: str
    summary: str
    samples: tuple[tuple[Segment, ...], ...]
    """A few rows as the model sees them, in stretches that are trained or not."""


def check_recipe(loaded: Loaded) -> list[StageCheck]:
    """The checks of every stage, in order; raises `UserError` at the first thing that is wrong."""
    run = Run(recipe=loaded.recipe, folder=loaded.recipe.out or Path("runs") / loaded.recipe.name)
    world = LocalWorld()
    return [_check_stage(run, name, world) for name in loaded.recipe.stages]


def check_ahead(run: Run, say: Callable[[str], None]) -> None:
    """The checks of all unfinished stages but the first, which makes its own at once: a mistake costs no training.

    Rows of a task family cannot be wrong, and are made when the stage comes. Raises as `check_recipe` does.
    """
    world = LocalWorld()
    unfinished = [name for name in run.recipe.stages if not is_sealed(run.stage_folder(name))]
    if unfinished[1:]:
        say(f"looking ahead at {', '.join(unfinished[1:])}")
    for name in unfinished[1:]:
        stage = with_references(run.recipe.stages[name], run.refer)
        if isinstance(getattr(stage, "data", None), GeneratedConfig):
            _find_chats(stage, world)
        else:
            _check_stage(run, name, world)


def _check_stage(run: Run, name: str, world: LocalWorld) -> StageCheck:
    stage = with_references(run.recipe.stages[name], run.refer)
    model = _tokenizer_of(run, name)
    _find_chats(stage, world)
    waiting = [path for _, path, what in references(run.recipe.stages[name]) if what == "rows"]
    if any(not is_sealed(run.stage_folder(path[1:])) for path in waiting):
        summary = f"checked once {' and '.join(waiting)} has made its rows"
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=())
    if isinstance(stage, SFTStage):
        data = gate_sets(world, model, stage)
        summary = data.describe(seed_of(run.recipe.seed, name))
        if stage.eval_data is not None:
            summary += f"; for evaluation {gate(world, model, stage, stage.eval_data).describe()}"
        shown = tuple(segments(row, world.template(model)) for row in data.rows[:SHOWN])
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)
    if isinstance(stage, RewardModelStage):
        given = lessons(world, model, stage)
        rows = [row for lesson in given.taught[:SHOWN] for row in lesson.atom.rows]
        shown = tuple(segments(row, world.template(model)) for row in rows)
        return StageCheck(stage=name, kind=stage.kind, summary=given.described, samples=shown)
    if isinstance(stage, PreferenceStage):
        gated = gate_preferences(world, model, stage, stage.data)
        summary = gated.describe()
        if stage.eval_data is not None:
            summary += f"; for evaluation {gate_preferences(world, model, stage, stage.eval_data).describe()}"
        answers = 2 if stage.loss.kto is None else 1
        rows = [row for atom in gated.atoms[:SHOWN] for row in atom.rows[:answers]]
        shown = tuple(segments(row, world.template(model)) for row in rows)
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)
    if isinstance(stage, ReviseStage | QuestionsStage | AgreementStage):
        return _check_rows(name, stage, world.template(model))
    if isinstance(stage, CompareStage) and stage.judge is not None:
        build_wording(stage.judge)
    grading = rubric(stage.tasks, stage.rewards, world)
    try:
        found = playable(stage, model, world, grading)
        mixed = pretraining_rows(stage, model, world) if isinstance(stage, RLStage) else None
    finally:
        grading.close()
    summary = found.describe() if mixed is None else f"{found.describe()}; ptx {mixed.describe()}"
    return _prompts(name, stage, summary, found.tasks, world.template(model))


def _check_rows(name: str, stage: ReviseStage | QuestionsStage | AgreementStage, template: Template) -> StageCheck:
    """Stages that make rows without a policy to play: what they will ask about, and that they know how."""
    if isinstance(stage, ReviseStage):
        listed, unread = tasks(stage.tasks)
        summary = f"{len(listed):,} tasks, {len(read_principles(stage.principles))} principles; {unread.describe()}"
        return _prompts(name, stage, summary, listed, template)
    compared, unread = comparisons(stage.data)
    wording, form = (stage.wording, stage.form) if isinstance(stage, QuestionsStage) else (stage.judge, "pairs")
    known = questions(compared[0], build_wording(wording), form=form, reasoning=wording.reasoning)
    asked = [Task(id=each.origin, messages=each.prompt) for each in known]
    return _prompts(name, stage, f"{len(compared):,} comparisons; {unread.describe()}", asked, template)


def _prompts(name: str, stage: Stage, summary: str, listed: Sequence[Task], template: Template) -> StageCheck:
    """A few prompts as the model is shown them."""
    prompts = [template.prompt(task.messages) for task in listed[:SHOWN]]
    shown = tuple((Segment(template.decode(prompt), False),) for prompt in prompts)
    return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)


def _find_chats(stage: Stage, world: LocalWorld) -> None:
    """A script, an address and a key are looked for; nobody is asked."""
    for chat in _chats(stage):
        world.chat(chat).close()


def _chats(value: Any) -> Iterator[ChatConfig]:
    """Everybody whom a stage asks: judges, writers and teachers."""
    if isinstance(value, EndpointChat | LocalChat | ScriptedChat):
        yield value
    for _, child in children(value):
        yield from _chats(child)


def _tokenizer_of(run: Run, name: str) -> ModelConfig:
    """A model with the stage's tokenizer: an earlier stage's does not exist yet, but it is the recipe's."""
    stage = run.recipe.stages[name]
    gate = stage.gate if isinstance(stage, RewardModelStage) else None
    model = run.model_of(name) if gate is None else run.resolve(gate.alone())
    made_here = model.path.startswith(str(run.folder))
    return model if not made_here or is_sealed(Path(model.path).parent) else run.recipe.model
