"""`whet check`: everything that can be wrong with the data, before a model is loaded.

Rows go through the same gate as in a run, gold answers through the same rewards, prompts through the same template;
a few rows are shown with their loss mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from whet.config import ModelConfig, PreferenceStage, RewardModelStage, RLStage, SFTStage
from whet.config.loading import Loaded
from whet.launch.world import LocalWorld
from whet.pipeline.preference_stage import gate_preferences
from whet.pipeline.reward_stage import lessons
from whet.pipeline.rl_stage import playable, pretraining_rows
from whet.pipeline.run import Run
from whet.pipeline.sft_stage import gate
from whet.pipeline.sources import rubric
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


def _check_stage(run: Run, name: str, world: LocalWorld) -> StageCheck:
    stage = run.recipe.stages[name]
    model = _tokenizer_of(run, name)
    if isinstance(stage, SFTStage):
        data = gate(world, model, stage, stage.data)
        summary = data.describe()
        if stage.eval_data is not None:
            summary += f"; for evaluation {gate(world, model, stage, stage.eval_data).describe()}"
        shown = tuple(segments(row, world.template(model)) for row in data.gated.rows[:SHOWN])
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)
    if isinstance(stage, RewardModelStage):
        taught, _, summary = lessons(world, model, stage)
        rows = [row for lesson in taught[:SHOWN] for row in lesson.atom.rows]
        shown = tuple(segments(row, world.template(model)) for row in rows)
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)
    if isinstance(stage, PreferenceStage):
        gated = gate_preferences(world, model, stage, stage.data)
        summary = gated.describe()
        if stage.eval_data is not None:
            summary += f"; for evaluation {gate_preferences(world, model, stage, stage.eval_data).describe()}"
        answers = 2 if stage.loss.kto is None else 1
        rows = [row for atom in gated.atoms[:SHOWN] for row in atom.rows[:answers]]
        shown = tuple(segments(row, world.template(model)) for row in rows)
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)
    grading = rubric(stage.tasks, stage.rewards, world)
    try:
        found = playable(stage, model, world, grading)
        mixed = pretraining_rows(stage, model, world) if isinstance(stage, RLStage) else None
    finally:
        grading.close()
    template = world.template(model)
    prompts = [template.prompt(task.messages) for task in found.tasks[:SHOWN]]
    shown = tuple((Segment(template.decode(prompt), False),) for prompt in prompts)
    summary = found.describe() if mixed is None else f"{found.describe()}; ptx {mixed.describe()}"
    return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=shown)


def _tokenizer_of(run: Run, name: str) -> ModelConfig:
    """A model with the stage's tokenizer: an earlier stage's does not exist yet, but it is the recipe's."""
    model = run.model_of(name)
    return model if not model.path.startswith(str(run.folder)) or Path(model.path).is_dir() else run.recipe.model
