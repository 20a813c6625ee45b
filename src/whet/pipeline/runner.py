"""Driving an algorithm: between its steps the runner logs, checkpoints and stops; the algorithm knows none of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from whet.errors import TrainingError
from whet.files import folder_size, write_json, writing
from whet.pipeline.stage import LEARNED, Context, Interrupted
from whet.records import Metric, Step, seed_of
from whet.tracking.log import RunLog
from whet.training.base import Trainer
from whet.training.checkpoint import newest_generation, save_generation

Begin = Callable[[int, Mapping[str, float]], Iterator[Step]]
"""(step to start after, state noted with it) -> the algorithm's steps."""

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
class WithCritic:
    """A policy's trainer and its critic's, saved as one; the critic in a folder of its own."""

    policy: Trainer
    critic: Trainer

    def save(self, folder: Path) -> None:
        """Both."""
        (folder / "critic").mkdir()
        self.policy.save(folder)
        self.critic.save(folder / "critic")

    def load(self, folder: Path) -> None:
        """Both."""
        self.policy.load(folder)
        self.critic.load(folder / "critic")

    def export(self, folder: Path) -> None:
        """Both; the critic as a model with one label."""
        self.policy.export(folder)
        self.critic.export(folder / "critic")


def drive(context: Context, trainer: Saved, log: RunLog, begin: Begin, *, steps: int) -> None:
    """Run an algorithm to its end, from the newest checkpoint if there is one, and export the model.

    Raises `TrainingError` where no step made an update: the model would be the one that the stage started from. Of a
    trial that is only said.
    """
    generation = newest_generation(context.checkpoints)
    done, state = 0, {}
    if generation is not None:
        for line in generation.passed_over:
            context.console.say(f"passed over: {line}")
        trainer.load(generation.folder)
        done, state = generation.step, dict(generation.state)
        context.console.say(f"{context.name}: continues after step {done}")
    log.truncate(done)
    saver = _Saver(context, trainer, log, done=done)
    context.console.begin(context.name, steps, done=done)
    algorithm = begin(done, state)
    notes: tuple[str, ...] = ()
    while True:
        # Whatever draws from global random state (dropout) draws the same in a resumed run.
        context.world.reseed(seed_of(context.seed, "step", done))
        step = next(algorithm, None)
        if step is None:
            break
        done, notes = step.index, step.notes
        saver.learned = saver.learned or _learns(step.metrics)
        log.write(step.index, step.metrics, step.groups, notes=step.notes)
        for sink in context.sinks:
            sink.log(context.name, step.index, step.metrics, step.groups)
        for note in step.notes:
            context.console.say(f"{context.name}  step {step.index}: {note}")
        if step.ill:
            continue  # the algorithm says why when it is asked to go on; nothing is built on such a step
        if context.stopped() and done < steps:
            saver.save(step)
            raise Interrupted
        saver.consider(step)
    log.close()
    context.console.close()
    if not saver.learned:
        why = "".join(f"; the last one: {note}" for note in notes[-1:])
        nothing = f"{context.name}: nothing was learned: none of {done} steps made an update{why}"
        if steps > TRIAL:
            raise TrainingError(nothing)
        context.console.say(nothing)
    with writing(context.folder / "model", folder_size(context.checkpoints)):
        trainer.export(context.folder / "model")


def with_evaluation(
    steps: Iterator[Step], measure: Callable[[], Mapping[str, Metric]], *, every: int, last: int
) -> Iterator[Step]:
    """The same steps, with what is measured on held-out rows (`eval_loss` ...) every so often and at the last one."""
    for step in steps:
        if step.index % every == 0 or step.index == last:
            held_out = {f"eval_{name}": metric.mean for name, metric in measure().items()}
            step = replace(step, metrics={**step.metrics, **held_out})
        yield step


def _learns(metrics: Mapping[str, float]) -> bool:
    """Whether a step changed any weights."""
    updates = [metrics[name] for name in ("optimizer_steps", "value/optimizer_steps") if name in metrics]
    return any(updates) if updates else not metrics.get("skipped", 0.0)


class _Saver:
    """Saves as often as the recipe says, or as often as costs at most its share of the time."""

    def __init__(self, context: Context, trainer: Saved, log: RunLog, *, done: int) -> None:
        self.trainer, self.log, self.config, self.root = trainer, log, context.save, context.checkpoints
        self.saved_step, self.saved_at, self.cost_s = done, time.monotonic(), 0.0
        self.learned = (self.root / LEARNED).exists()

    def consider(self, step: Step) -> None:
        """Save if it is time."""
        if self.config.every is not None:
            due = step.index - self.saved_step >= self.config.every
        else:
            due = self.cost_s <= self.config.overhead * (time.monotonic() - self.saved_at)
        if due:
            self.save(step)

    def save(self, step: Step) -> None:
        """Save now."""
        began = time.monotonic()
        self.log.sync()
        if self.learned:  # before the checkpoint is there: from now on the folder belongs to the stage's identity
            write_json(self.root / LEARNED, {"step": step.index})
        save_generation(self.root, step.index, step.state, self.trainer.save, keep=self.config.keep)
        self.saved_step, self.saved_at = step.index, time.monotonic()
        self.cost_s = self.saved_at - began
