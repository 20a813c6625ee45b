"""Training a gate: the trunk and the head are frozen, so each answer goes through them once, and never again."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from whet.config import TrainConfig
from whet.models.gating import Gate
from whet.models.heads import RewardFacts, objectives_of, reward_facts
from whet.models.language import LanguageModel
from whet.records import Atom, TokenRow
from whet.training.base import Objective, Outputs, Tally
from whet.training.engine import LocalTrainer, as_batch
from whet.training.memory import Budget

Key = tuple[int, tuple[int, ...]]


class GateTrainer(LocalTrainer):
    """`Trainer` whose only weights are a gate's, over answers whose features it was told; each is read at its end."""

    def __init__(self, model: LanguageModel, gate: Gate, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.gate = gate
        self._known: dict[Key, Tensor] = {}

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the gate weighs, in order."""
        return objectives_of(self.model.module)

    def described(self, facts: RewardFacts) -> RewardFacts:
        """The facts with what the gate is, and what the model below it says of its ratings."""
        below = reward_facts(self.model.module) or RewardFacts()
        return replace(facts, gate=self.gate.facts, ratings=below.ratings)

    def features(self, rows: Sequence[TokenRow]) -> Tensor:
        """All that the gate reads of these answers, (R, D + K + 1), by the frozen model."""
        return torch.cat(self._read(self.model, rows, self.model.features))

    def learn_from(self, rows: Sequence[TokenRow], features_RF: Tensor) -> None:
        """These are the features of these answers; what is read by the gate alone needs no micro-batches."""
        self._known |= dict(zip(map(_key, rows), features_RF, strict=True))
        self.budget = Budget(sys.maxsize)

    def debias(self, rows: Sequence[TokenRow]) -> None:
        """Let the gate choose over these answers what it takes off the objectives."""
        _, score_RK, length_R = self._inputs(rows)
        self.gate.debias(score_RK, length_R)

    def scores(self, rows: Sequence[TokenRow]) -> list[tuple[tuple[float, ...], ...]]:
        """What the gate makes of each answer, see `Gate.forward`."""
        with torch.no_grad():
            return [(tuple(said),) for said in self.gate(*self._inputs(rows)).tolist()]

    def _run(self, atoms: Sequence[Atom], objective: Objective) -> tuple[Tensor, Mapping[str, Tally]]:
        score_TK = self.gate(*self._inputs([row for atom in atoms for row in atom.rows]))
        nobody_T = torch.full_like(score_TK[:, 0], math.nan)
        return objective(Outputs(logp_T=nobody_T, score_TK=score_TK), as_batch(atoms, nobody_T))

    def _inputs(self, rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor, Tensor]:
        read_RF = torch.stack([self._known[_key(row)] for row in rows]).to(self.model.device)
        count = len(self.objectives)
        state_RD, score_RK, length_R1 = read_RF.split([read_RF.shape[1] - count - 1, count, 1], dim=1)
        return state_RD, score_RK, length_R1.squeeze(1)


def _key(row: TokenRow) -> Key:
    return row.shared, row.tokens
