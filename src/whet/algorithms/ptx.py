"""PPO-ptx: beside the policy gradient, imitation of rows that the policy should not unlearn (InstructGPT 2203.02155).

At every update the mean NLL of a few rows, times a coefficient, is added to the loss. Which rows follows from the
number of the update, so a resumed run takes the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from whet.algorithms.sft import CrossEntropy, weigh
from whet.config.policy_terms import PtxConfig
from whet.records import Atom, Metric, TokenRow, seed_of
from whet.training.base import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingMix:
    """Rows to imitate beside the policy gradient."""

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
        weighed = weigh([self.rows[orders[epoch][place]] for epoch, place in places])
        return [
            Atom(
                rows=tuple(
                    row.with_columns(weight=self.config.coefficient * row.columns["weight"]) for row in atom.rows
                )
            )
            for atom in weighed
        ]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(seed_of(self.seed, "ptx", epoch)).shuffle(order)
        return order
