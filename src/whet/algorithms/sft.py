"""Imitation: the trained tokens of rows, each counting the same over the whole step; a stage (SFT), or a mix."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from whet.algorithms.groups import to_atoms
from whet.algorithms.supervised import supervised
from whet.config import TrainConfig
from whet.config.policy_terms import PtxConfig
from whet.data.base import Lazy
from whet.data.mixture import Blend
from whet.formulas.step import token_mean
from whet.records import Atom, Metric, Step, TokenRow, seed_of
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


def weigh(rows: Sequence[TokenRow], coefficient: float = 1.0) -> list[Atom]:
    """The rows as atoms, by the prompts that they share; each token weighs `coefficient` / tokens of all of them."""
    weights = token_mean([row.trained_count for row in rows])
    return to_atoms([row.with_columns(weight=coefficient * weight) for row, weight in zip(rows, weights, strict=True)])


def weigh_again(atoms: Sequence[Atom]) -> list[Atom]:
    """The same of the rows of these atoms."""
    return weigh([row for atom in atoms for row in atom.rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingMix:
    """PPO-ptx: rows that a policy gradient should not unlearn are imitated beside it (InstructGPT 2203.02155).

    At every update the mean NLL of a few rows, times a coefficient, is added to the loss. Which rows follows from the
    number of the update, so a resumed run takes the same ones.
    """

    rows: Sequence[TokenRow]
    config: PtxConfig
    seed: int

    def add(self, trainer: Trainer, update: int) -> dict[str, Metric]:
        """Add the gradient of coefficient x mean NLL of the rows of this update (from 0), and say what the NLL is."""
        found = trainer.forward_backward(self.atoms(update), CrossEntropy())
        return {"ptx/loss": found["loss"], "oom_retries": found["oom_retries"]}

    def atoms(self, update: int) -> list[Atom]:
        """The rows of an update, each token weighing coefficient / tokens; one shuffled epoch follows another."""
        size = self.config.batch_size
        places = [divmod(position, len(self.rows)) for position in range(update * size, (update + 1) * size)]
        orders = {epoch: self._order(epoch) for epoch, _ in places}
        return weigh([self.rows[orders[epoch][place]] for epoch, place in places], self.config.coefficient)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(seed_of(self.seed, "ptx", epoch)).shuffle(order)
        return order
