"""The loop of every algorithm that learns from examples that are there: imitation, reward models, preferences.

What makes them different is handed over: how a batch's examples are weighed, and the objective.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

from whet.config import TrainConfig
from whet.errors import TrainingError
from whet.records import Atom, Step, seed_of
from whet.training.base import Objective, Trainer
from whet.training.optim import learning_rate

Weigh = Callable[[Sequence[Atom]], list[Atom]]
"""Adds the column `weight` to the examples of one optimizer step."""
NOT_FINITE = 3
"""Updates in a row that may be thrown away."""


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
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on; `batch_size` examples a step, reshuffled every epoch.

    `state` is what the `Step` before `start` carried. Every metric of the objective is its mean over the step. Raises
    `TrainingError` where gradients stay not finite.
    """
    steps = supervised_steps(len(examples), config)
    thrown_away = state["thrown_away"] if state else 0.0
    tokens = state["num_tokens"] if state else 0.0
    for step in range(start, steps):
        began = time.monotonic()
        batch = [examples[i] for i in _batch(step, len(examples), config, seed)]
        found = trainer.forward_backward(weigh(batch), objective)
        rate = learning_rate(step + 1, steps, config)
        result = trainer.optim_step(rate)
        thrown_away = 0.0 if result.applied else thrown_away + 1
        if thrown_away >= NOT_FINITE:
            raise TrainingError(
                f"step {step + 1}: the gradient was not finite {NOT_FINITE} steps in a row; lower train.lr"
            )
        seconds = time.monotonic() - began
        seen = sum(atom.cost for atom in batch)
        tokens += seen
        yield Step(
            index=step + 1,
            metrics={
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
            state={"thrown_away": thrown_away, "num_tokens": float(tokens)},
        )


def supervised_steps(examples: int, config: TrainConfig) -> int:
    """Optimizer steps of the stage: `steps`, or what `epochs` take (the last batch of the last epoch may be short)."""
    if config.steps is not None:
        return config.steps
    return max(1, -(-int(examples * config.epochs) // config.batch_size))


def _batch(step: int, examples: int, config: TrainConfig, seed: int) -> list[int]:
    """Indices of the examples of a step: the shuffled epochs one after another, cut into batches."""
    size = config.batch_size
    if config.steps is None:
        end = min((step + 1) * size, int(examples * config.epochs))
    else:
        end = (step + 1) * size
    places = [divmod(position, examples) for position in range(step * size, max(end, step * size + 1))]
    return [_order(examples, seed_of(seed, "epoch", epoch))[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(examples: int, seed: int) -> list[int]:
    """An epoch's shuffled examples; kept, since every step of the epoch asks for it."""
    order = list(range(examples))
    random.Random(seed).shuffle(order)
    return order
