"""Running a recipe: stages in order, finished ones skipped, an unfinished one continued.

    RUN/recipe.json              the resolved recipe           RUN/run.json     versions, threads, when
    RUN/stages/01-sft/           metrics.jsonl, rollouts/, model/ and, when done, manifest.json
    RUN/checkpoints/01-sft/      what an unfinished stage goes on from
    RUN/report.html              drawn from the files above

One process at a time: the folder is locked. Giving the same command again continues; another recipe is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.config import EvalStage, ModelConfig, Recipe
from whet.config.loading import NOT_MATHEMATICS, resolved
from whet.config.references import with_references
from whet.config.strict import Strict
from whet.errors import RunError
from whet.files import is_sealed, read_json, seal, write_json, writing
from whet.pipeline.agreement_stage import run_agreement
from whet.pipeline.compare_stage import run_compare
from whet.pipeline.eval_stage import run_eval
from whet.pipeline.online_preference_stage import run_online_preference
from whet.pipeline.preference_stage import run_preference
from whet.pipeline.questions_stage import run_questions
from whet.pipeline.revise_stage import run_revise
from whet.pipeline.reward_stage import run_reward_model
from whet.pipeline.rl_stage import run_rl
from whet.pipeline.sft_stage import run_sft
from whet.pipeline.stage import ROWS, Context, Interrupted, World
from whet.pipeline.step_labels_stage import run_step_labels
from whet.records import seed_of
from whet.tracking.base import Sink
from whet.tracking.console import Console
from whet.tracking.report import write_report
from whet.tracking.sinks import RunInfo, trackers

Stopped = Callable[[], bool]
RUNNERS: dict[str, Callable[[Context], object]] = {
    "sft": run_sft,
    "reward_model": run_reward_model,
    "preference": run_preference,
    "online_preference": run_online_preference,
    "rl": run_rl,
    "eval": run_eval,
    "compare": run_compare,
    "step_labels": run_step_labels,
    "revise": run_revise,
    "questions": run_questions,
    "agreement": run_agreement,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recipe in its folder."""

    recipe: Recipe
    folder: Path

    def stage_folder(self, name: str) -> Path:
        """`stages/02-rl` for the second stage, named rl."""
        return self.folder / "stages" / f"{list(self.recipe.stages).index(name) + 1:02d}-{name}"

    def checkpoints(self, name: str) -> Path:
        """What the stage goes on from while it is unfinished."""
        return self.folder / "checkpoints" / self.stage_folder(name).name

    def model_folder(self, name: str) -> Path:
        """The model that a stage made."""
        return self.stage_folder(name) / "model"

    def model_of(self, name: str) -> ModelConfig:
        """What a stage starts from: its own choice, or what the model-making stage before it made."""
        stage, made = self.recipe.stages[name], self.recipe.model
        if stage.model is not None:
            return self.resolve(stage.model)
        for earlier, other in self.recipe.stages.items():
            if earlier == name:
                break
            if other.makes == "model":
                made = self.recipe.model.model_copy(update={"path": str(self.model_folder(earlier))})
        return made

    def resolve(self, model: ModelConfig) -> ModelConfig:
        """`@stage` as the folder of the model that the stage made, `@model` as the recipe's own."""
        if not model.path.startswith("@"):
            return model
        if model.path == "@model":
            return self.recipe.model
        return model.model_copy(update={"path": str(self.model_folder(model.path[1:]))})

    def refer(self, section: Strict) -> Strict:
        """A section whose `path` is a reference, with what the stage made (or the recipe's own model) in its place."""
        path = getattr(section, "path", "")
        if path == "@model":
            own = {key: value for key, value in self.recipe.model if key in type(section).model_fields}
            return section.model_copy(update=own)
        folder = self.stage_folder(path[1:])
        return section.model_copy(update={"path": str(folder / (ROWS if section.refers_to == "rows" else "model"))})


def run_recipe(
    run: Run,
    world: World,
    console: Console,
    stopped: Stopped,
    *,
    about: Mapping[str, Any],
    ahead: Callable[[], None] = lambda: None,
) -> None:
    """Run every stage that is not done, and draw the report. `about` goes to `run.json` when the run is new.

    `ahead` looks at what is to come once the folder is ours, and may refuse it: the folder then belongs to no recipe
    that it did not belong to before.
    """
    with claimed(run):
        ahead()
        for name, value in (
            ("recipe.json", resolved(run.recipe)),
            ("run.json", {"name": run.recipe.name, "seed": run.recipe.seed, **about}),
        ):
            if not (run.folder / name).exists():
                write_json(run.folder / name, value)
        _run_stages(run, world, console, stopped)


def _run_stages(run: Run, world: World, console: Console, stopped: Stopped) -> None:
    told = RunInfo(name=run.recipe.name, folder=run.folder, recipe=resolved(run.recipe))
    with trackers(run.recipe.trackers, told, console.say) as others:
        try:
            for name in run.recipe.stages:
                if stopped():
                    raise Interrupted
                if is_sealed(run.stage_folder(name)):
                    console.say(f"{name}: done before")
                else:
                    _run_stage(run, name, world, console, others, stopped)
                # Here, so that a run killed between the manifest and this line loses them the next time.
                shutil.rmtree(run.checkpoints(name), ignore_errors=True)
        except BaseException:
            console.close()
            with suppress(Exception):  # what stopped the run is the news, not that its report failed, too
                write_report(run.folder)
            raise
        console.close()
        write_report(run.folder)


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Hold the run folder for this process; refuse one that another process holds or another recipe made."""
    folder = run.folder
    with writing(folder / "recipe.json", 4096):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunError(
                f"{folder}: another run is at work here ({lock.read().strip()}); choose another `out=`"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        _check_recipe(run)
        yield


def _check_recipe(run: Run) -> None:
    """A folder belongs to one recipe: what would change the mathematics is refused, by name."""
    path = run.folder / "recipe.json"
    if not path.exists():
        return
    before, now = read_json(path), resolved(run.recipe)
    changed = [key for key in sorted(_differences(before, now)) if key.partition(".")[0] not in NOT_MATHEMATICS]
    if changed or list(before["stages"]) != list(now["stages"]):
        what = ", ".join(changed[:4]) or "the order of stages"
        raise RunError(
            f"{run.folder}: was made by another recipe ({what} differ); choose another `out=`, "
            "or remove the folder to start over"
        )


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield at


def context_of(
    run: Run,
    name: str,
    world: World,
    console: Console,
    stopped: Stopped,
    *,
    others: Sequence[Sink] = (),
    models: Mapping[str, str] | None = None,
) -> Context:
    """What a stage of this run is given; `others` hear of its steps, `models` replaces what an evaluation evaluates."""
    folder, model = run.stage_folder(name), run.model_of(name)
    stage = with_references(run.recipe.stages[name], run.refer)
    paths = models or (stage.models if isinstance(stage, EvalStage) else {}) or {"model": model.path}
    named = {label: run.recipe.model.model_copy(update={"path": path}) for label, path in paths.items()}
    return Context(
        name=name,
        config=stage,
        model=model,
        models={label: run.resolve(other) for label, other in named.items()},
        folder=folder,
        checkpoints=run.checkpoints(name),
        seed=seed_of(run.recipe.seed, name),
        save=run.recipe.save,
        world=world,
        console=console,
        sinks=(console, *others),
        stopped=stopped,
    )


def _run_stage(run: Run, name: str, world: World, console: Console, others: Sequence[Sink], stopped: Stopped) -> None:
    context = context_of(run, name, world, console, stopped, others=others)
    kind = context.config.kind
    write_json(context.folder / "stage.json", {"name": name, "kind": kind})
    world.reseed(context.seed)
    RUNNERS[kind](context)
    seal(context.folder, {"stage": name, "kind": kind, "identity": _identity(context, run.recipe.seed)})


def _identity(context: Context, seed: int) -> str:
    """What the artifact follows from: the stage's part of the recipe, the seed, and the models that it used."""
    used = [context.model, *context.models.values()]
    parts = [context.config.model_dump_json(), str(seed), *(model.model_dump_json() for model in used)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
