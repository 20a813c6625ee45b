"""Supervised fine-tuning: imitate the trained tokens, each counting the same over the whole step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from whet.algorithms.supervised import supervised
from whet.config import TrainConfig
from whet.data.lazy import Lazy
from whet.data.mixture import Blend
from whet.formulas.reduce import token_mean
from whet.records import Atom, Step, TokenRow
from whet.rollouts.assemble import to_atoms
from whet.training.base import Batch, Objective, Outputs, Tally, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy(Objective):
    """Cross-entropy: sum of w * (-log p)."""

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and its plain mean over tokens as a metric."""
        nll_T = -outputs.logp_T
        count = batch.weight_T.new_tensor(len(nll_T))
        return (batch.weight_T * nll_T).sum(), {"loss": Tally(total=nll_T.detach().sum(), weight=count)}


def sft(
    trainer: Trainer,
    rows: Sequence[TokenRow],
    config: TrainConfig,
    *,
    seed: int,
    start: int = 0,
    state: Mapping[str, float] | None = None,
    blend: Blend | None = None,
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on, of `batch_size` rows.

    `state` is what the `Step` before `start` carried. `blend`: of which sets the rows are; None: one.
    """
    atoms = Lazy(len(rows), lambda index: Atom(rows=(rows[index],)))
    return supervised(
        trainer, atoms, weigh_again, CrossEntropy(), config, seed=seed, start=start, state=state, blend=blend
    )


def weigh(rows: Sequence[TokenRow]) -> list[Atom]:
    """The rows as atoms, by the prompts that they share, their tokens weighted by the token mean over all of them."""
    weights = token_mean([row.trained_count for row in rows])
    return to_atoms([row.with_columns(weight=weight) for row, weight in zip(rows, weights, strict=True)])


def weigh_again(atoms: Sequence[Atom]) -> list[Atom]:
    """The same of the rows of these atoms."""
    return weigh([row for atom in atoms for row in atom.rows])
