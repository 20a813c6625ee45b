"""Supervised fine-tuning: imitate the trained tokens, each counting the same over the whole step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from whet.config import TrainConfig
from whet.errors import TrainingError
from whet.formulas.reduce import token_mean
from whet.records import Atom, Step, TokenRow, seed_of
from whet.training.base import Batch, Need, Outputs, Tally, Trainer
from whet.training.optim import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitate:
    """Cross-entropy: sum of w * (-log p)."""

    needs: frozenset[Need] = field(default_factory=frozenset)
    temperature: float = 1.0

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and its plain mean over tokens as a metric."""
        nll_T = -outputs.logp_T
        count = batch.weight_T.new_tensor(len(nll_T))
        return (batch.weight_T * nll_T).sum(), {"loss": Tally(total=nll_T.detach().sum(), weight=count)}


def sft(
    trainer: Trainer, rows: Sequence[TokenRow], config: TrainConfig, *, seed: int, start: int = 0
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on; `batch_size` rows a step, reshuffled every epoch."""
    steps = sft_steps(len(rows), config)
    skipped = 0
    tokens = sum(len(rows[i].tokens) for step in range(start) for i in _batch(step, len(rows), config, seed))
    for step in range(start, steps):
        began = time.monotonic()
        batch = [rows[i] for i in _batch(step, len(rows), config, seed)]
        metrics = trainer.forward_backward(weigh(batch), Imitate())
        rate = learning_rate(step + 1, steps, config)
        result = trainer.optim_step(config.lr * rate, muon_lr=config.muon_lr * rate)
        skipped = 0 if result.applied else skipped + 1
        if skipped >= 3:
            raise TrainingError(f"step {step + 1}: the gradient was not finite three steps in a row; lower train.lr")
        seconds = time.monotonic() - began
        seen = sum(len(row.tokens) for row in batch)
        tokens += seen
        yield Step(
            index=step + 1,
            metrics={
                "loss": metrics["loss"].mean,
                "lr": config.lr * rate,
                "grad_norm": result.grad_norm,
                "skipped": float(not result.applied),
                "num_tokens": float(tokens),
                "trained_tokens": metrics["loss"].weight,
                "tokens_per_second": seen / seconds,
                "time/train": seconds,
            },
        )


def sft_steps(rows: int, config: TrainConfig) -> int:
    """Optimizer steps of the stage: `steps`, or what `epochs` take (the last batch of the last epoch may be short)."""
    return config.steps if config.steps is not None else max(1, -(-int(rows * config.epochs) // config.batch_size))


def weigh(rows: Sequence[TokenRow]) -> list[Atom]:
    """Each row an atom of its own, its tokens weighted by the token mean over all the rows."""
    weights = token_mean([row.trained_count for row in rows])
    return [
        Atom(rows=(row.with_columns(weight=(weight,) * row.trained_count),))
        for row, weight in zip(rows, weights, strict=True)
    ]


def _batch(step: int, rows: int, config: TrainConfig, seed: int) -> list[int]:
    """Indices of the rows of a step: the shuffled epochs one after another, cut into batches."""
    size = config.batch_size
    if config.steps is None:
        end = min((step + 1) * size, int(rows * config.epochs))
    else:
        end = (step + 1) * size
    places = [divmod(position, rows) for position in range(step * size, max(end, step * size + 1))]
    return [_order(rows, seed_of(seed, "epoch", epoch))[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(rows: int, seed: int) -> list[int]:
    """An epoch's shuffled rows; kept, since every step of the epoch asks for it."""
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order
