"""Running a recipe: stages in order, finished ones skipped, an unfinished one continued.

    RUN/recipe.json              the resolved recipe           RUN/run.json     versions, threads, when
    RUN/stages/01-sft/           stage.json, metrics.jsonl, rollouts/, model/ and, when done, manifest.json
    RUN/checkpoints/01-sft/      what an unfinished stage goes on from
    RUN/report.html              drawn from the files above

One process at a time: the folder is locked. Giving the same command again continues; what is not as it was when a stage
began to train is refused (`lineage`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from whet.config import ModelConfig, Recipe
from whet.config.budget import times
from whet.config.loading import resolved
from whet.config.loops import LoopConfig
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict, references, with_references
from whet.errors import ConfigError, RunError
from whet.files import is_sealed, read_json, seal, write_atomic, write_json, writing
from whet.models.locate import FINAL
from whet.pipeline import lineage
from whet.pipeline.card import CARD, model_card
from whet.pipeline.kinds import KINDS
from whet.pipeline.lineage import NOTED, UNDECIDED, Choices, begun
from whet.pipeline.stage import ROWS, Context, Interrupted, Kind, World
from whet.records import seed_of
from whet.tracking.base import Sink
from whet.tracking.charts import Look
from whet.tracking.console import Console
from whet.tracking.report import write_report
from whet.tracking.sinks import LiveReport, RunInfo, trackers

Stopped = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How far a loop goes."""

    last: int = 0
    best: int = 0
    """The one that it ended with: the best by its rule, or the last where it has none."""
    why: str = ""
    """Why it stops before all rounds are run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recipe in its folder."""

    recipe: Recipe
    folder: Path
    kinds: Sequence[Kind] = KINDS

    def kind(self, name: str) -> Kind:
        """What kind of stage it is."""
        return next(kind for kind in self.kinds if type(self.recipe.stages[name]) is kind.config)

    def stage_folder(self, name: str) -> Path:
        """`stages/02-rl` for the second stage, named rl."""
        return self.folder / "stages" / f"{list(self.recipe.stages).index(name) + 1:02d}-{name}"

    def checkpoints(self, name: str) -> Path:
        """What the stage goes on from while it is unfinished."""
        return self.folder / "checkpoints" / self.stage_folder(name).name

    @property
    def looks(self) -> dict[str, Look]:
        """How the report shows each kind of stage."""
        return {kind.config.kind_name(): kind.look for kind in self.kinds}

    @property
    def has_begun(self) -> bool:
        """Whether any stage is done or has begun to train: until then the folder belongs to nothing."""
        return any(begun(self.stage_folder(name), self.checkpoints(name)) for name in self.recipe.stages)

    @property
    def reached(self) -> set[Path]:
        """What a run that ends now would go on from: stages that are done, and checkpoints."""
        done = {self.stage_folder(name) for name in self.recipe.stages if is_sealed(self.stage_folder(name))}
        return done | set((self.folder / "checkpoints").glob("*/step-*"))

    def ready(self) -> list[str]:
        """The stages whose inputs are all there: those that are done before the first one that is not, and that one."""
        stages = [name for name in self.recipe.stages if not self.left_out(name)]
        done = list(takewhile(lambda name: is_sealed(self.stage_folder(name)), stages))
        return stages[: len(done) + 1]

    def model_folder(self, name: str) -> Path:
        """The last model that a stage made."""
        return self.stage_folder(name) / "model"

    def rounds(self, loop: str) -> Rounds:
        """How far a loop goes, as far as its evaluations tell by now."""
        config = self.recipe.loops[loop]
        judges = [self.recipe.judge_of(names) for names in config.stages] if config.until is not None else []
        folders = takewhile(is_sealed, (self.stage_folder(name) for name in judges if name is not None))
        return rounds_of([folder / "eval.json" for folder in folders], config)

    def left_out(self, name: str) -> str:
        """Why a stage is not run: its loop has ended before its round; empty: it is run."""
        loop, number = self.recipe.places.get(name, ("", 0))
        rounds = self.rounds(loop) if loop else Rounds()
        return f"{loop} ended after round {rounds.last}: {rounds.why}" if number > rounds.last else ""

    def model_of(self, name: str) -> ModelConfig:
        """What a stage starts from: its own choice, or what the model-making stage before it made."""
        start = self.recipe.stages[name].start
        if start is not None:
            return self.resolve(start)
        earlier = self._maker(name)
        return self.recipe.model if earlier is None else self.recipe.model.at(str(self.model_folder(earlier)))

    def _maker(self, name: str = "") -> str | None:
        """The last stage before this one that makes a model; of a loop that is over, the one that it ended with.

        Without a name it is the one whose model the run comes to.
        """
        earlier = list(takewhile(lambda other: other != name, self.recipe.stages))
        maker = next((other for other in reversed(earlier) if self.recipe.stages[other].makes == "model"), None)
        loop, here = (self.recipe.places.get(each or "", ("", 0))[0] for each in (maker, name))
        return maker if loop in ("", here) else self.named(loop, "model")

    def named(self, target: str, what: Made) -> str | None:
        """The stage that `@target` is; None: what the recipe starts from."""
        name = target.partition("/")[0]
        if name in self.recipe.loops:
            return self.recipe.maker_in(name, self.rounds(name).best, what)
        return None if name == "model" else name

    def made(self, path: str, what: Made) -> Path | None:
        """Where it is what `@stage` is (`@stage/best`: its best model); None as in `named`.

        Raises `RunError` where its loop ended before it.
        """
        name = self.named(path[1:], what)
        if name is None:
            return None
        if why := self.left_out(name):
            raise RunError(f"{path} was not made: {why}; name the loop, @{self.recipe.places[name][0]}")
        return self.stage_folder(name) / (ROWS if what == "rows" else path.partition("/")[2] or "model")

    def reads(self, name: str) -> set[str]:
        """The earlier stages whose artifacts the stage reads, and those that decide which round of a loop it reads."""
        stage = self.recipe.stages[name]
        asked = [(path, what) for _, path, what in references(stage)]
        asked += [(path, "model") for path in (stage.evaluates or {}).values() if path.startswith("@")]
        found = {self.named(path[1:], what) for path, what in asked}
        loops = {path[1:].partition("/")[0] for path, _ in asked}
        if stage.start is None and stage.reads_model and not stage.evaluates:
            maker = self._maker(name)
            found.add(maker)
            loops |= {self.recipe.places.get(maker or "", ("", 0))[0]} - {self.recipe.places.get(name, ("", 0))[0]}
        for loop in (config for key, config in self.recipe.loops.items() if key in loops and config.until is not None):
            found |= {self.recipe.judge_of(names) for names in loop.stages}
        return {each for each in found if each is not None}

    def resolve(self, model: ModelConfig) -> ModelConfig:
        """`@stage` as the folder of the model that the stage made, `@model` as the recipe's own."""
        if not model.path.startswith("@"):
            return model
        folder = self.made(model.path, "model")
        return self.recipe.model if folder is None else model.at(str(folder))

    def origin(self, model: ModelConfig) -> ModelConfig:
        """The model, or while it is still to be made what it is made from: it has the same tokenizer and shapes."""
        model = self.resolve(model)
        made = Path(model.path).parent  # the last model of a stage, or its best
        maker = next((name for name in self.recipe.stages if made == self.stage_folder(name)), None)
        return model if maker is None or is_sealed(self.stage_folder(maker)) else self.origin(self.model_of(maker))

    def section(self, name: str) -> StageBase:
        """What the recipe says of a stage, with paths in the place of references."""

        def refer(part: Strict) -> Strict:
            assert part.refers_to is not None
            made = self.made(str(getattr(part, "path", "")), part.refers_to)
            if made is None:
                own = {key: value for key, value in self.recipe.model if key in type(part).model_fields}
                return part.model_copy(update=own)
            return part.model_copy(update={"path": str(made)})

        stage: StageBase = with_references(self.recipe.stages[name], refer)
        return stage


def run_recipe(
    run: Run,
    world: World,
    console: Console,
    stopped: Stopped,
    *,
    about: Mapping[str, Any],
    ahead: Callable[[], None] = lambda: None,
    choices: Choices = UNDECIDED,
) -> None:
    """Run every stage that is not done, and draw the report. `about` goes to `run.json` when the run is new.

    `ahead` looks at what is to come once the folder is ours, and may refuse it. A folder belongs to nothing until a
    stage has begun to train. Raises `RunError` where what has begun is not what the recipe says now.
    """
    with claimed(run):
        _restart(run, choices.restart, console)
        lineage.refuse_others(run.folder, [run.stage_folder(name).name for name in run.recipe.stages])
        _compare(run, [context_of(run, name, world, console, stopped) for name in run.ready()], choices)
        ahead()
        if not (run.folder / "run.json").exists() or not run.has_begun:
            write_json(run.folder / "run.json", {"name": run.recipe.name, "seed": run.recipe.seed, **about})
        write_json(run.folder / "recipe.json", resolved(run.recipe))
        _run_stages(run, world, console, stopped, choices)


def _run_stages(run: Run, world: World, console: Console, stopped: Stopped, choices: Choices) -> None:
    noted = run.folder / "run.json"
    facts = read_json(noted)
    if facts.pop(FINAL, None) is not None:  # not before this run has come to its end, too
        write_json(noted, facts)
    told = RunInfo(name=run.recipe.name, folder=run.folder, recipe=resolved(run.recipe))
    budgets = {name: stage.budget() for name, stage in run.recipe.stages.items()}
    console.plan({name: times(budget.steps, budget.sequences) for name, budget in budgets.items()})
    live = LiveReport(lambda: _report(run, live=True), console.say)
    with trackers(run.recipe.trackers, told, console.say) as others:
        try:
            for name in run.recipe.stages:
                if stopped():
                    raise Interrupted
                if why := run.left_out(name):
                    console.say(f"{name}: not run; {why}")
                    about = {"name": name, "kind": run.recipe.stages[name].kind, "left_out": why}
                    if not begun(run.stage_folder(name), run.checkpoints(name)):  # by another rule: it stays what it is
                        write_json(run.stage_folder(name) / NOTED, about)
                    continue
                context = context_of(run, name, world, console, stopped, others=(live, *others))
                _compare(run, [context], choices)
                if is_sealed(context.folder):
                    console.say(f"{name}: done before{lineage.other_code(context)}")
                else:
                    _run_stage(run, context, choices)
                    live.consider()
                # Here, so that a run killed between the manifest and this line loses them the next time.
                shutil.rmtree(context.checkpoints, ignore_errors=True)
        except BaseException as error:
            console.close()
            failure = str(error) or type(error).__name__
            with suppress(Exception):  # what stopped the run is the news, not that its report failed, too
                failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
                _report(run, failure=failure if failed else "")
            raise
        console.close()
        write_json(noted, {**facts, FINAL: run._maker()})
        _report(run)


def _report(run: Run, *, failure: str = "", live: bool = False) -> None:
    order = list(run.recipe.stages)
    reads = {name: sorted(run.reads(name), key=order.index) for name in order}
    write_report(run.folder, run.looks, reads=reads, failure=failure, live=live)


def _run_stage(run: Run, context: Context, choices: Choices) -> None:
    fresh = not begun(context.folder, context.checkpoints)
    for other in run.reads(context.name):
        made = run.stage_folder(other) / (ROWS if run.recipe.stages[other].makes == "rows" else "model")
        if run.recipe.stages[other].makes is not None and is_sealed(made.parent) and not made.exists():
            raise RunError(f"{made}: is gone, though {other} is done; put it back, or make it again: --restart {other}")
    if not fresh and (code := lineage.other_code(context)):
        context.console.say(f"{context.name}: goes on from a checkpoint{code}")
    lineage.note(context, run.recipe.seed)
    found = lineage.elsewhere(context, run.recipe.seed, choices) if choices.reuse is not None and fresh else None
    if found is not None:
        lineage.take(found, context)
    else:
        context.world.reseed(context.seed)
        run.kind(context.name).run(context)
        if context.config.makes in ("model", "reward"):
            for made in filter(Path.is_dir, (context.folder / "model", context.folder / "best")):
                write_atomic(made / CARD, model_card(run.folder, made).encode())
    seal(context.folder, {"stage": context.name, "kind": context.config.kind})


def _compare(run: Run, contexts: Sequence[Context], choices: Choices) -> None:
    found = [(context.name, lineage.refused(context, run.recipe.seed, choices.accept)) for context in contexts]
    if any(changed for _, changed in found):
        raise lineage.refusal(run.folder, found)


def _restart(run: Run, names: Sequence[str], console: Console) -> None:
    """Remove what these stages made, and every stage that reads it."""
    places, stages = run.recipe.places, run.recipe.stages
    if unknown := next((name for name in names if name not in stages and name not in run.recipe.loops), None):
        raise ConfigError(f"--restart {unknown}: no such stage; there are {', '.join([*stages, *run.recipe.loops])}")
    again = {*names, *(name for name, (loop, _) in places.items() if loop in names)}
    for name in run.recipe.stages:
        if name in again or again & run.reads(name):
            again.add(name)
            if lineage.remove(run.stage_folder(name), run.checkpoints(name)):
                console.say(f"{name}: starts over")


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Hold the run folder for this process; refuse one that another process holds."""
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
        yield


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
    """What a stage of this run is given; `others` are further sinks, `models` replaces what an evaluation evaluates."""
    folder, model = run.stage_folder(name), run.model_of(name)
    stage = run.section(name)
    paths = models or ({} if stage.evaluates is None else stage.evaluates or {"model": model.path})
    named = {label: run.recipe.model.at(path) for label, path in paths.items()}
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


def rounds_of(tables: Sequence[Path], config: LoopConfig) -> Rounds:
    """What the rule of a loop makes of the evaluations (`eval.json`) of its rounds until now."""
    until, best, scores = config.until, 0, list[float]()
    for number, table in enumerate(tables, start=1):
        assert until is not None
        row = read_json(table)["rows"][-1]
        known = {"accuracy": row["accuracy"], **row["rewards"]}
        if until.metric not in known:
            raise ConfigError(f"until.metric is {until.metric!r}, and {table} has {', '.join(known)}")
        scores.append(known[until.metric])
        best = number if best == 0 or scores[-1] > scores[best - 1] + until.min_gain else best
        now = f"{until.metric} {scores[-1]:.3f}"
        if until.reach is not None and scores[-1] >= until.reach:
            return Rounds(last=number, best=number, why=f"{now} reaches {until.reach:g}")
        if until.patience is not None and number - best >= until.patience:
            return Rounds(last=number, best=best, why=f"{now} is no better than {scores[best - 1]:.3f} of round {best}")
    return Rounds(last=config.repeat, best=best or config.repeat)
