"""Driving an algorithm: between its steps the runner logs, checkpoints and stops; the algorithm knows none of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from whet.errors import RunError, SamplersLost, TrainingError
from whet.files import folder_size, write_json, writing
from whet.pipeline.held_out import HeldOut, Measure
from whet.pipeline.stage import LEARNED, Context, Interrupted
from whet.records import State, Step, seed_of
from whet.rollouts.feed import Feed
from whet.rollouts.ledger import AheadFeed
from whet.tracking.log import RunLog
from whet.training.checkpoint import generation_at, newest_generation, save_generation

Begin = Callable[..., Iterator[Step]]
"""(start: step to start after, state: noted with it) -> the algorithm's steps."""

TRIAL = 2
"""A stage of at most so many steps tries out whether a recipe runs, often with an untrained model."""


class Saved(Protocol):
    """Whatever learns in a stage, as far as the runner cares."""

    def save(self, folder: Path) -> None:
        """Everything that `load` needs for a bit-exact continuation."""

    def load(self, folder: Path) -> None:
        """Continue from `save`."""

    def export(self, folder: Path) -> None:
        """The model in the Hugging Face layout."""


@dataclass(frozen=True, slots=True)
class Together:
    """What learns and the groups that were played ahead, saved as one; all but the first in folders of their own."""

    trainer: Saved
    critic: Saved | None
    feed: AheadFeed | None

    @property
    def others(self) -> dict[str, Saved | AheadFeed]:
        """By the names of their folders."""
        named = {"critic": self.critic, "rollouts": self.feed}
        return {name: part for name, part in named.items() if part is not None}

    def save(self, folder: Path) -> None:
        """All of them."""
        self.trainer.save(folder)
        for name, part in self.others.items():
            (folder / name).mkdir()
            part.save(folder / name)

    def load(self, folder: Path) -> None:
        """All of them. Raises `RunError` where the checkpoint was written without a lag."""
        if self.feed is not None and not (folder / "rollouts").is_dir():
            raise RunError(f"{folder}: was written with lag.steps: 0; go on with that, or --restart the stage")
        self.trainer.load(folder)
        for name, part in self.others.items():
            part.load(folder / name)

    def export(self, folder: Path) -> None:
        """What was learned; the critic as a model with one label."""
        self.trainer.export(folder)
        if self.critic is not None:
            self.critic.export(folder / "critic")


def drive(
    context: Context,
    trainer: Saved,
    log: RunLog,
    begin: Begin,
    *,
    steps: int,
    feed: Feed | None = None,
    critic: Saved | None = None,
    measures: Sequence[Measure] = (),
    exported: Callable[[Path], None] = lambda _: None,
) -> None:
    """Run an algorithm to its end, from the newest checkpoint if there is one, and export the model.

    The algorithm's `feed` and `critic`, if it has them, go on with it. `measures` of held-out data are taken between
    steps; where the stage keeps the `best` model, that is exported, too. `exported` is told of each folder while the
    trainer has its weights. Raises `TrainingError` where no step made an update: the model would be the one that the
    stage started from. Of a trial that is only said.
    """
    held_out = HeldOut(context.config, steps, measures)
    trainer = Together(trainer, critic, feed if isinstance(feed, AheadFeed) else None)
    done, state = _resumed(context, trainer, log, held_out, feed)
    saver = _Saver(context, trainer, log, held_out, done=done)
    context.console.begin(context.name, steps, done=done)
    _look_first(context, log, held_out, saver, Step(index=done, metrics={}, state=state))
    algorithm = begin(start=done, state=state)
    notes: tuple[str, ...] = ()
    while not held_out.over:
        # Whatever draws from global random state (dropout) draws the same in a resumed run.
        context.world.reseed(seed_of(context.seed, "step", done))
        try:
            step = next(algorithm, None)
        except SamplersLost:  # in the middle of a wait: nothing has changed since the last step
            saver.save_last()
            raise
        if step is None:
            break
        step, stopped = _measured(step, held_out)
        done, notes = step.index, step.notes
        saver.learned, saver.last = saver.learned or _learns(step.metrics), step
        log.write(step.index, step.metrics, step.groups, notes=step.notes)
        _tell(context, step)
        if step.ill:
            continue  # the algorithm says why when it is asked to go on; nothing is built on such a step
        if stopped is not None or (context.stopped() and done < steps):
            saver.save(step)
            raise stopped or Interrupted
        saver.consider(step)
    log.close()
    context.console.close()
    if held_out.over:
        context.console.say(f"{context.name}: ends after step {done}: {held_out.over}")
    if not saver.learned:
        _tell_idle(context, done, notes, trial=steps <= TRIAL)
    _export(context, trainer, "model", exported)
    if held_out.best is not None:
        trainer.load(generation_at(context.checkpoints, held_out.best_step))
        _export(context, trainer, "best", exported)


def _resumed(context: Context, trainer: Saved, log: RunLog, held_out: HeldOut, feed: Feed | None) -> tuple[int, State]:
    """The step to go on after, and what the algorithm noted with it; everything stands as it did then."""
    generation = newest_generation(context.checkpoints)
    if generation is None:
        log.truncate(-1)
        return 0, {}
    for line in generation.passed_over:
        context.console.say(f"passed over: {line}")
    trainer.load(generation.folder)
    log.truncate(generation.step)
    context.console.say(f"{context.name}: continues after step {generation.step}")
    state = held_out.restore(generation.state)
    if feed is not None and state:
        feed.restore(state)
    return generation.step, state


def _look_first(context: Context, log: RunLog, held_out: HeldOut, saver: _Saver, start: Step) -> None:
    """Measure the model that the stage starts from, or one that was stopped half-way, if that is due."""
    if held_out.due(start.index):
        looked = replace(start, metrics=held_out.look(start.index))
        log.amend(start.index, looked.metrics)
        _tell(context, looked)
        saver.consider_best(looked)


def _measured(step: Step, held_out: HeldOut) -> tuple[Step, Exception | None]:
    """The step with what is measured on held-out data after it, and what stopped that: then it is due still."""
    if step.ill or not held_out.due(step.index):
        return step, None
    try:
        return replace(step, metrics={**step.metrics, **held_out.look(step.index)}), None
    except (Interrupted, SamplersLost) as stopped:
        return step, stopped


def _tell(context: Context, step: Step) -> None:
    for sink in context.sinks:
        sink.log(context.name, step.index, step.metrics, step.groups)
    for note in step.notes:
        context.console.say(f"{context.name}  step {step.index}: {note}")


def _tell_idle(context: Context, done: int, notes: Sequence[str], *, trial: bool) -> None:
    """No step made an update: said of a trial, else a `TrainingError`."""
    why = "".join(f"; the last one: {note}" for note in notes[-1:])
    nothing = f"{context.name}: nothing was learned: none of {done} steps made an update{why}"
    if not trial:
        raise TrainingError(nothing)
    context.console.say(nothing)


def _export(context: Context, trainer: Saved, name: str, exported: Callable[[Path], None]) -> None:
    folder = context.folder / name
    with writing(folder, folder_size(context.checkpoints)):
        trainer.export(folder)
    exported(folder)


def _learns(metrics: Mapping[str, float]) -> bool:
    """Whether a step changed any weights."""
    updates = [metrics[name] for name in ("optimizer_steps", "value/optimizer_steps") if name in metrics]
    return any(updates) if updates else not metrics.get("skipped", 0.0)


class _Saver:
    """Saves as often as the recipe says, or as often as costs at most its share of the time; and the best model."""

    def __init__(self, context: Context, trainer: Saved, log: RunLog, held_out: HeldOut, *, done: int) -> None:
        self.trainer, self.log, self.config, self.root = trainer, log, context.save, context.checkpoints
        self.held_out = held_out
        self.saved_step, self.saved_at, self.cost_s = done, time.monotonic(), 0.0
        self.learned = (self.root / LEARNED).exists()
        self.last: Step | None = None

    def consider(self, step: Step) -> None:
        """Save if it is time."""
        if self.config.every is not None:
            due = step.index - self.saved_step >= self.config.every
        else:
            due = self.cost_s <= self.config.overhead * (time.monotonic() - self.saved_at)
        if due:
            self.save(step)
        else:
            self.consider_best(step)

    def consider_best(self, step: Step) -> None:
        """Save if this is the best model so far."""
        if self.held_out.best_step == step.index:
            self.save(step)

    def save_last(self) -> None:
        """Save the last step, if it is not saved."""
        if self.last is not None and self.last.index > self.saved_step:
            self.save(self.last)

    def save(self, step: Step) -> None:
        """Save now."""
        began = time.monotonic()
        self.log.sync()
        if self.learned:  # before the checkpoint is there: from now on the folder belongs to the stage's identity
            write_json(self.root / LEARNED, {"step": step.index})
        known = {**step.state, **self.held_out.state}
        keep, spare = self.config.keep, self.held_out.best_step
        save_generation(self.root, step.index, known, self.trainer.save, keep=keep, spare=spare)
        self.saved_step, self.saved_at = step.index, time.monotonic()
        self.cost_s = self.saved_at - began
