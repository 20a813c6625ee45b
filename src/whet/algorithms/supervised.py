"""The loop of every algorithm that learns from examples that are there: imitation, reward models, preferences.

What makes them different is handed over: how a batch's examples are weighed, and the objective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

from whet.algorithms.groups import NAMED, skipped_update
from whet.config import TrainConfig
from whet.data.mixture import Blend, epoch_order
from whet.errors import TrainingError
from whet.records import Atom, Group, State, Step
from whet.training.base import Objective, Trainer
from whet.training.optim import learning_rate

Weigh = Callable[[Sequence[Atom]], list[Atom]]
"""Adds the column `weight` to the examples of one optimizer step."""
NOT_FINITE = 3
"""Updates in a row that may be thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What one optimizer step learns from, and where it comes from."""

    atoms: Sequence[Atom]
    places: Sequence[int] = ()
    """Where they stand among the stage's examples; none: they are this step's own."""
    groups: tuple[Group, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampling_s: float = 0.0
    state: State = field(default_factory=dict)
    """What is needed to draw the next step's."""


def supervised(
    trainer: Trainer,
    examples: Sequence[Atom],
    weigh: Weigh,
    objective: Objective,
    config: TrainConfig,
    *,
    seed: int,
    start: int = 0,
    state: Mapping[str, float] | None = None,
    blend: Blend | None = None,
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on; `batch_size` examples a step, reshuffled every epoch.

    `blend`: of which sets the examples are; None: one. `state` is what the `Step` before `start` carried. Every metric
    of the objective is its mean over the step. Raises `TrainingError` where gradients stay not finite.
    """
    draw, steps = partial(drawn_from, examples, blend, config, seed), supervised_steps(len(examples), config)
    return updates(trainer, draw, weigh, objective, config, steps=steps, start=start, state=state)


def updates(
    trainer: Trainer,
    draw: Callable[[int], Drawn],
    weigh: Weigh,
    objective: Objective,
    config: TrainConfig,
    *,
    steps: int,
    start: int = 0,
    state: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on, of what `draw` gives for it (from 0)."""
    thrown_away = state["thrown_away"] if state else 0.0
    tokens = state["num_tokens"] if state else 0.0
    for step in range(start, steps):
        began = time.monotonic()
        drawn = draw(step)
        batch = weigh(drawn.atoms)
        places = drawn.places or range(len(batch))
        found = trainer.forward_backward(batch, objective)
        rate = learning_rate(step + 1, steps, config)
        result = trainer.optim_step(rate)
        thrown_away = 0.0 if result.applied else thrown_away + 1
        notes = [] if result.applied else [f"{skipped_update(result)}; {_culprits(trainer, places, batch, objective)}"]
        if thrown_away >= NOT_FINITE:
            raise TrainingError(f"step {step + 1}: {notes[0]}, {NOT_FINITE} steps in a row; lower train.lr")
        seconds = time.monotonic() - began - drawn.sampling_s
        seen = sum(atom.cost for atom in batch)
        tokens += seen
        yield Step(
            index=step + 1,
            groups=drawn.groups,
            metrics={
                **drawn.metrics,
                **{name: metric.mean for name, metric in found.items()},
                "oom_retries": found["oom_retries"].total,
                "lr": config.lr * rate,
                "grad_norm": result.grad_norm,
                "skipped": float(not result.applied),
                "num_tokens": float(tokens),
                "trained_tokens": float(sum(row.trained_count for atom in batch for row in atom.rows)),
                "tokens_per_second": seen / seconds,
                "time/train": seconds,
            },
            state={**drawn.state, "thrown_away": thrown_away, "num_tokens": float(tokens)},
            notes=tuple(notes),
        )


def _culprits(trainer: Trainer, places: Sequence[int], batch: Sequence[Atom], objective: Objective) -> str:
    """The examples of a step whose loss is not finite by itself, by their places in the stage's rows."""
    alone = [trainer.evaluate([atom], objective)["loss"].total for atom in batch]
    found = [str(place + 1) for place, loss in zip(places, alone, strict=True) if not isfinite(loss)]
    named = f"{', '.join(found[:NAMED])}{f' and {len(found) - NAMED} more' if len(found) > NAMED else ''}"
    return f"the loss of example {named} is not" if found else "each example's own loss is"


def supervised_steps(examples: int, config: TrainConfig) -> int:
    """Optimizer steps of the stage: `steps`, or what `epochs` take (the last batch of the last epoch may be short)."""
    if config.steps is not None:
        return config.steps
    return max(1, -(-int(examples * config.epochs) // config.batch_size))


def drawn_from(examples: Sequence[Atom], blend: Blend | None, config: TrainConfig, seed: int, step: int) -> Drawn:
    """The examples of a step."""
    places = _batch(step, blend or Blend((len(examples),)), config, seed)
    return Drawn(atoms=[examples[i] for i in places], places=places)


def largest_step(costs: Sequence[int], config: TrainConfig, seed: int, blend: Blend | None = None) -> int:
    """Most tokens of a step, of examples that have so many each."""
    shares = blend or Blend((len(costs),))
    steps = range(supervised_steps(len(costs), config))
    return max(int(sum(costs[place] for place in _batch(step, shares, config, seed))) for step in steps)


def _batch(step: int, blend: Blend, config: TrainConfig, seed: int) -> list[int]:
    """Indices of the examples of a step: the shuffled epochs one after another, cut into batches."""
    size, total = config.batch_size, blend.total
    if config.steps is None:
        end = min((step + 1) * size, int(total * config.epochs))
    else:
        end = (step + 1) * size
    places = [divmod(position, total) for position in range(step * size, max(end, step * size + 1))]
    return [epoch_order(blend, epoch, seed)[place] for epoch, place in places]
