"""The critic: a trainer over a value model that fills the columns `value`, `advantage` and `return`.

To the policy's update it is one provider of advantages among others: where GRPO computes them from a group's rewards
in plain code, a critic computes them from a column `reward` in a pass of its own trainer. It is stateless beside that
trainer, whose weights and optimizer are its checkpoint.

An episode's rows form one chain of trained tokens. Observations are not in it: the state after an action is the one
in which the next action token is chosen.

Legend: T trained tokens of an episode (over all its rows), N those of all episodes of the step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from whet.algorithms.groups import minibatches, to_atoms
from whet.config.policy_terms import CriticConfig
from whet.formulas import value as formulas
from whet.formulas.step import token_mean
from whet.records import Atom, Column, Flags, Metric, TokenRow, add_metrics, largest, seed_of
from whet.training.base import Batch, Need, Objective, Outputs, Tally, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode's rows in order of time: the chain that rewards, values and advantages run along."""

    rows: tuple[TokenRow, ...]
    truncated: bool = False
    """Whether the episode was cut off rather than over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss(Objective):
    """Half the squared distance of the values to the column `return`, clipped around the column `value`."""

    clip: float | None
    needs: ClassVar[frozenset[Need]] = frozenset({"value"})

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and the share of tokens at which the clip stops the gradient."""
        assert outputs.value_T is not None, "the engine gives what is needed"
        value_T, old_T, return_T = outputs.value_T, batch.columns["value"], batch.columns["return"]
        if self.clip is None:
            loss_T, clipped_T = formulas.value_loss(value_T, return_T), torch.zeros_like(value_T)
        else:
            loss_T = formulas.clipped_value_loss(value_T, old_T, return_T, clip=self.clip)
            clipped_T = formulas.value_clipped(value_T.detach(), old_T, return_T, clip=self.clip)
        one, counted = batch.weight_T.new_ones(()), (batch.weight_T > 0).to(value_T.dtype)
        loss = (batch.weight_T * loss_T).sum()
        return loss, {
            "value/loss": Tally(total=loss.detach(), weight=one),
            "value/clip_fraction": Tally(total=(counted * clipped_T).sum(), weight=counted.sum()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WithValue(Objective):
    """A policy's objective and its critic's on one trunk, in one pass: L_policy + coefficient * L_value."""

    policy: Objective
    value: ValueLoss
    coefficient: float

    @property
    def needs(self) -> frozenset[Need]:
        """What the policy needs, and values."""
        return self.policy.needs | {"logp", "value"}

    @property
    def temperature(self) -> float:
        """The policy's."""
        return self.policy.temperature

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The sum of both losses, and both sets of metrics."""
        policy_loss, policy_tallies = self.policy(outputs, batch)
        value_loss, value_tallies = self.value(outputs, batch)
        return policy_loss + self.coefficient * value_loss, {**policy_tallies, **value_tallies}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provided:
    """Trajectories with their new columns, in order, and what was measured on the way."""

    trajectories: tuple[Trajectory, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """A value model at work: provides advantages, and learns from the returns."""

    trainer: Trainer
    config: CriticConfig

    def provide(self, trajectories: Sequence[Trajectory]) -> Provided:
        """Add `value`, `advantage` and `return` to rows that have a `reward`, one number for each trained token.

        Advantages are raw: scaling them is another axis, and returns never see it. The explained variance is that of
        values which have not seen these returns.
        """
        assert trajectories, "a step without scored episodes has nothing to judge"
        values, after = self._values(trajectories)
        judged = [
            self._judge(trajectory, values_T, bootstrap)
            for trajectory, values_T, bootstrap in zip(trajectories, values, after, strict=True)
        ]
        values_N, returns_N = torch.cat(values), torch.cat([returns_T for _, returns_T in judged])
        advantages_N = torch.cat([advantages_T for advantages_T, _ in judged])
        metrics = {
            "value/explained_variance": formulas.explained_variance(values_N, returns_N),
            "value/mean": float(values_N.mean()),
            "return/mean": float(returns_N.mean()),
            "advantage/raw_std": float(advantages_N.std(correction=0)),
        }
        advantages = advantages_N.split([len(values_T) for values_T in values])
        provided = tuple(
            replace(trajectory, rows=_spread(trajectory.rows, {"value": v_T, "advantage": a_T, "return": r_T}))
            for trajectory, v_T, a_T, (_, r_T) in zip(trajectories, values, advantages, judged, strict=True)
        )
        return Provided(trajectories=provided, metrics=metrics)

    def update(self, rows: Sequence[TokenRow], *, lr_factor: float, seed: int) -> dict[str, float]:
        """Regress the values on the column `return`: `epochs` times over all rows, in `minibatches` steps each.

        Rows of one prompt stay together. `lr_factor` is the share of the peak rate, `seed` draws the epochs' orders.
        """
        atoms, objective = to_atoms(rows), ValueLoss(clip=self.config.clip)
        metrics: dict[str, Metric] = {}
        norms: list[float] = []
        skipped = 0
        for epoch in range(self.config.epochs):
            order = random.Random(seed_of(seed, epoch)).sample(atoms, len(atoms))
            for minibatch in minibatches(order, self.config.minibatches):
                weighed = weigh(minibatch, level=self.config.level)
                metrics = add_metrics(metrics, self.trainer.forward_backward(weighed, objective))
                result = self.trainer.optim_step(lr_factor)
                norms.append(result.grad_norm)
                skipped += not result.applied
        return {
            **{name: metric.mean for name, metric in metrics.items() if name.startswith("value/")},
            "value/loss": metrics["value/loss"].total / len(norms),  # a sum over micro-batches: their number is nothing
            "value/grad_norm": largest(norms),
            "value/optimizer_steps": float(len(norms) - skipped),
            "value/skipped": float(skipped),
        }

    def _values(self, trajectories: Sequence[Trajectory]) -> tuple[list[Tensor], list[float]]:
        """For each trajectory its values, and the value after its end (0 where it is over), from one pass."""
        rows = [row for trajectory in trajectories for row in trajectory.rows]
        cut = [i for i, t in enumerate(trajectories) if t.truncated and self.config.bootstrap_truncated]
        asked = [*rows, *(_one_further(trajectories[i].rows[-1]) for i in cut)]
        found = self.trainer.forward(asked, "value")["value"]
        after = dict(zip(cut, (float(last.item()) for last in found[len(rows) :]), strict=True))
        ahead = iter(found)
        values = [_chain([next(ahead) for _ in trajectory.rows]) for trajectory in trajectories]
        return values, [after[i] if i in after else 0.0 for i in range(len(trajectories))]

    def _judge(self, trajectory: Trajectory, values_T: Tensor, bootstrap: float) -> tuple[Tensor, Tensor]:
        """(raw advantages, returns) of one trajectory."""
        config, rewards_T = self.config, _chain([row.columns["reward"] for row in trajectory.rows])
        if not len(values_T):
            return values_T, values_T
        lam = config.lam_policy
        if config.length_alpha is not None:
            lam = formulas.length_adaptive_lambda(len(values_T), alpha=config.length_alpha)
        if config.level == "token":
            advantages_T = formulas.gae(rewards_T, values_T, gamma=config.gamma, lam=lam, bootstrap=bootstrap)
            returns_T = formulas.returns(
                rewards_T, values_T, gamma=config.gamma, lam=config.lam_value, bootstrap=bootstrap
            )
            return advantages_T, returns_T
        turn_T = torch.tensor(turns(trajectory.rows))
        advantages_T, targets_T = (
            formulas.turn_gae(rewards_T, values_T, turn_T, gamma=config.gamma, lam=lam_of, bootstrap=bootstrap)
            for lam_of in (lam, config.lam_value)
        )
        first_T = torch.searchsorted(turn_T, turn_T)  # the index of the first token of each token's turn
        return advantages_T, targets_T + values_T[first_T]


# ------------------------------------------------------------------------------------------------ parts


def turns(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """The turn (from 0) of each trained token: a run of trained tokens is one, and every row begins another."""
    found: list[int] = []
    turn = -1
    for row in rows:
        begins = row.trained & ~np.concatenate([[False], row.trained[:-1]])
        turn_N = turn + np.cumsum(begins)
        found += turn_N[row.trained].tolist()
        turn = int(turn_N[-1])
    return tuple(found)


def weigh(atoms: Sequence[Atom], *, level: Literal["token", "turn"]) -> list[Atom]:
    """The atoms of one optimizer step, all their trained tokens (or first tokens of turns) weighing the same."""
    marks = [[_marks(row, level) for row in atom.rows] for atom in atoms]
    (weight,) = token_mean([sum(int(row_marks.sum()) for atom_marks in marks for row_marks in atom_marks)])
    return [
        Atom(
            rows=tuple(
                row.with_columns(weight=weight * row_marks.astype(np.float64))
                for row, row_marks in zip(atom.rows, atom_marks, strict=True)
            )
        )
        for atom, atom_marks in zip(atoms, marks, strict=True)
    ]


def _marks(row: TokenRow, level: Literal["token", "turn"]) -> Flags:
    """For each trained token of a row whether the critic is trained there."""
    if level == "token":
        return np.ones(row.trained_count, np.bool_)
    return np.diff(np.array(turns([row]), np.int64), prepend=-1) > 0


def _one_further(row: TokenRow) -> TokenRow:
    """The row with one more token, trained alone: the state in which it is chosen is the one after the row."""
    length = len(row.tokens)
    tokens = np.append(row.tokens, row.tokens[-1:])
    return TokenRow(tokens=tokens, trained=np.arange(length + 1) == length, shared=row.shared)


def _spread(rows: Sequence[TokenRow], columns: Mapping[str, Tensor]) -> tuple[TokenRow, ...]:
    """The rows with these numbers of the whole chain, each row its own."""
    counts = [row.trained_count for row in rows]
    pieces = {name: [piece.numpy() for piece in chain_T.split(counts)] for name, chain_T in columns.items()}
    return tuple(row.with_columns(**{name: pieces[name][i] for name in columns}) for i, row in enumerate(rows))


def _chain(columns: Sequence[Column]) -> Tensor:
    """An episode's rows as one chain of numbers, in double precision."""
    return torch.from_numpy(np.concatenate([*columns, ()], dtype=np.float64))
