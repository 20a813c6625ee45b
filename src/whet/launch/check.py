"""`whet check`: everything that can be wrong with the data, before a model is loaded; a run looks ahead with the same.

Rows go through the same gate as in a run, gold answers through the same rewards, prompts through the same template;
a few rows are shown with their loss mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.config import DataConfig, GeneratedConfig, TeacherConfig
from whet.config.judge import EndpointChat, LocalChat, ScriptedChat
from whet.config.loading import Loaded
from whet.config.shaping import RepetitionReward
from whet.config.strict import references, walk
from whet.files import is_sealed
from whet.launch.world import LocalWorld
from whet.models.tokenizer import require_same_tokens
from whet.pipeline.kinds import KINDS
from whet.pipeline.run import Run, context_of
from whet.pipeline.stage import Kind, Seen
from whet.tracking.console import Console
from whet.training.gate import Segment, segments

AT_HAND_BYTES = 8 * 2**20
"""Of a file that is read for a plan: a few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheck:
    """What the gate says of one stage's rows or tasks."""

    stage: str
    kind: str
    summary: str
    samples: tuple[tuple[Segment, ...], ...]
    """A few rows as the model sees them, in stretches that are trained or not."""


def check_recipe(loaded: Loaded, kinds: Sequence[Kind] = KINDS) -> list[StageCheck]:
    """The checks of every stage, in order; raises `UserError` at the first thing that is wrong."""
    run = Run(recipe=loaded.recipe, folder=loaded.recipe.folder, kinds=kinds)
    world = LocalWorld()
    return [_check_stage(run, name, world) for name in loaded.recipe.distinct]


def seen_at_hand(run: Run, name: str) -> Seen | None:
    """What a stage finds when it looks at its rows and tasks, if they are generated or in small files, and no model or
    environment has to be asked; else None. Gold answers are not graded, which may take long."""
    stage = run.section(name)
    parts = [part for _, part in walk(stage)]
    asked = any(isinstance(part, EndpointChat | LocalChat | ScriptedChat) for part in parts)
    if asked or getattr(stage, "environment", None) is not None:
        return None
    at_hand = all(map(_is_at_hand, (part for part in parts if isinstance(part, DataConfig | GeneratedConfig))))
    return _look(run, name, LocalWorld(), graded=False) if at_hand else None


def check_ahead(run: Run, say: Callable[[str], None]) -> None:
    """The checks of all unfinished stages but the first, which makes its own at once: a mistake costs no training.

    Rows of a task family cannot be wrong, and are made when the stage comes. Raises as `check_recipe` does.
    """
    world = LocalWorld()
    unfinished = [name for name in run.recipe.distinct if not is_sealed(run.stage_folder(name))]
    if unfinished[1:]:
        say(f"looking ahead at {', '.join(unfinished[1:])}")
    for name in unfinished[1:]:
        stage = run.section(name)
        if isinstance(getattr(stage, "data", None), GeneratedConfig):
            _find_models(run, name, world)
        else:
            _check_stage(run, name, world)


def _check_stage(run: Run, name: str, world: LocalWorld) -> StageCheck:
    stage = run.section(name)
    _find_models(run, name, world)
    asked = references(run.recipe.stages[name])
    waiting = {path: run.named(path[1:], what) for _, path, what in asked if what == "rows"}
    if any(maker is not None and not is_sealed(run.stage_folder(maker)) for maker in waiting.values()):
        summary = f"checked once {' and '.join(waiting)} has made its rows"
        return StageCheck(stage=name, kind=stage.kind, summary=summary, samples=())
    seen, template = _look(run, name, world), world.template(run.origin(run.model_of(name)))
    shown = [segments(row, template) for row in seen.rows]
    prompts = (template.prompt(task.messages, seen.tools, settings=task.settings) for task in seen.prompts)
    shown += [(Segment(template.decode(prompt), False),) for prompt in prompts]
    return StageCheck(stage=name, kind=stage.kind, summary=seen.summary, samples=tuple(shown))


def _look(run: Run, name: str, world: LocalWorld, *, graded: bool = True) -> Seen:
    context = context_of(run, name, world, Console(quiet=True), lambda: False)
    config = context.config if graded else _ungraded(context.config)
    return run.kind(name).check(replace(context, config=config, model=run.origin(run.model_of(name))))


def _ungraded(section: Any) -> Any:
    """The same with a reward that reads no gold answer, also in its evaluation."""
    changed: dict[str, Any] = {"rewards": [RepetitionReward(kind="repetition")]} if hasattr(section, "rewards") else {}
    if (evaluation := getattr(section, "evaluation", None)) is not None:
        changed["evaluation"] = _ungraded(evaluation)
    return section.model_copy(update=changed)


def _is_at_hand(source: DataConfig | GeneratedConfig) -> bool:
    if isinstance(source, GeneratedConfig):
        return True
    return (file := Path(source.path)).is_file() and file.stat().st_size <= AT_HAND_BYTES


def _find_models(run: Run, name: str, world: LocalWorld) -> None:
    """Looks for the script, address and key of those who are asked (no request is sent), and at a teacher's tokens."""
    for _, part in walk(run.section(name)):
        if isinstance(part, TeacherConfig):
            require_same_tokens(run.origin(part), run.origin(run.model_of(name)))
        elif isinstance(part, EndpointChat | LocalChat | ScriptedChat):
            world.chat(part).close()
