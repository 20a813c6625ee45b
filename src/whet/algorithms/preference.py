"""Direct preference optimisation: raise what is preferred over what is not, straight from comparisons.

Before a step is split, its rows get what the losses compare with: the reference's log-probabilities, for a few losses
a statistic of the whole step, and one weight for each pair. Which losses these are, is data (`formulas.preference`);
nothing here has a branch for any, but for KTO, which is of single answers.

Legend: T trained tokens, R rows (answers), P pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from whet.algorithms.own_loss import own_loss
from whet.algorithms.sequence_sums import SequenceSums, add_constant, pairs_of, sequence_sums
from whet.algorithms.supervised import supervised
from whet.config import TrainConfig
from whet.config.preference import LossConfig, OwnTerm, Term, formula_of
from whet.data.base import Judged
from whet.errors import DataError, TrainingError
from whet.formulas.constants import Bound
from whet.formulas.preference import Pairs, kto
from whet.records import Atom, Column, Step, TokenRow
from whet.training.answers import Tokenised
from whet.training.base import Batch, Objective, Outputs, Tally, Trainer


def preference(
    trainer: Trainer,
    examples: Sequence[Atom],
    loss: LossConfig,
    train: TrainConfig,
    *,
    seed: int,
    max_gap: float,
    start: int = 0,
    state: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on, of `batch_size` comparisons or judged answers.

    `state` is what the `Step` before `start` carried. Examples have the column `ref_logp` where the loss needs it.
    Raises `TrainingError` where the policy is further than `max_gap` nats per token from its reference before the
    first update.
    """
    weigh = partial(weigh_preferences, loss=loss, trainer=trainer)
    for step in supervised(trainer, examples, weigh, objective_of(loss), train, seed=seed, start=start, state=state):
        if step.index == 1:
            check_start(step.metrics, max_gap)
        yield step


def objective_of(loss: LossConfig) -> Objective:
    """The loss as an objective: functions with their constants bound."""
    if loss.kto is None:
        return PairLoss(terms=tuple(_pair_term(name, term) for name, term in loss.terms.items()))
    constants = loss.kto.model_dump(exclude={"weight"})
    return KTOLoss(loss=Bound(kto, **constants), weight=loss.kto.weight, beta=constants["beta"])


def weigh_preferences(batch: Sequence[Atom], *, loss: LossConfig, trainer: Trainer) -> list[Atom]:
    """The examples of a step with statistics of the whole of it, and the weights: each example counts the same.

    Of a comparison all pairs of its answers are in its atom, and share its weight. A judged answer comes with a
    mismatched one beside it (`beside_mismatched`), which is measured here and left behind.
    """
    if loss.kto is not None:
        return _with_baseline(batch, trainer)
    atoms = list(batch)
    if any(formula_of(name, term).statistic for name, term in loss.terms.items()):
        atoms = _with_statistics(atoms, loss, trainer)
    pairs = [len(atom.rows) * (len(atom.rows) - 1) // 2 for atom in atoms]
    return [add_constant(atom, "weight", 1 / (len(atoms) * count)) for atom, count in zip(atoms, pairs, strict=True)]


def check_start(metrics: Mapping[str, float], max_gap: float) -> None:
    """Refuse a policy that is not its own reference before the first update: the loss would not begin where it must."""
    gap = metrics["reference/gap"] if "reference/gap" in metrics else 0.0
    if not gap <= max_gap:
        raise TrainingError(
            f"before the first update the policy is {gap:.2g} nats per token away from its reference (at most "
            f"{max_gap:g} is rounding), so the loss does not begin where it must (DPO: log 2); is dropout on in the "
            "model's config or in train.lora.dropout? Else raise max_reference_gap"
        )


# ----------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTerm:
    """One loss of the sum, its constants bound."""

    name: str
    loss: Callable[[Pairs], Tensor]
    weight: float
    beta: float
    """What its margin is multiplied by; 1 where it has no such constant."""
    reference: bool
    means: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss(Objective):
    """The weighted sum of preference losses, for every pair of every atom (a better row stands before a worse one).

    Columns, the same for all tokens of a row but `ref_logp`: `weight` (of each pair of the atom), and where they are
    asked for `ref_logp`, `confidence` (that the order is right) and the statistics of the step, `step/LOSS`.
    """

    terms: tuple[PairTerm, ...]
    compares: ClassVar[bool] = True

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and metrics under TRL's names, as means over pairs."""
        answers = sequence_sums(outputs.logp_T, batch)
        better_P, worse_P = pairs_of(batch.atom_R)
        weight_P = answers.constants["weight"][better_P]
        losses = {term.name: _doubted(term, answers, better_P, worse_P) for term in self.terms}
        loss_P = torch.stack([term.weight * losses[term.name] for term in self.terms]).sum(0)
        with torch.no_grad():
            chosen_P, rejected_P = self._rewards(answers, better_P, worse_P)
            measured = {
                "loss": loss_P,
                **({f"loss/{name}": each_P for name, each_P in losses.items()} if len(losses) > 1 else {}),
                "rewards/chosen": chosen_P,
                "rewards/rejected": rejected_P,
                "rewards/margins": chosen_P - rejected_P,
                "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
                "logps/chosen": answers.logp_R[better_P],
                "logps/rejected": answers.logp_R[worse_P],
            }
            total = weight_P.sum()
            tallies = {
                name: Tally(total=(weight_P * value_P).sum(), weight=total) for name, value_P in measured.items()
            }
        return (weight_P * loss_P).sum(), {**tallies, **answers.distance}

    def _rewards(self, answers: SequenceSums, better_P: Tensor, worse_P: Tensor) -> tuple[Tensor, Tensor]:
        """beta times what the first loss compares: how good it holds the two answers to be."""
        term = next((term for term in self.terms if term.name != "nll"), self.terms[0])
        measure_R = answers.logp_R - answers.ref_R if term.reference else answers.logp_R
        if term.means:
            measure_R = measure_R / answers.length_R
        return term.beta * measure_R[better_P], term.beta * measure_R[worse_P]


def _doubted(term: PairTerm, answers: SequenceSums, better_P: Tensor, worse_P: Tensor) -> Tensor:
    """The loss of each pair; where the order is right with some confidence only, that share of it both ways."""
    loss_P = term.loss(answers.pairs(better_P, worse_P, term.name))
    if "confidence" not in answers.constants:
        return loss_P
    right_P = answers.constants["confidence"][better_P]
    return right_P * loss_P + (1 - right_P) * term.loss(answers.pairs(worse_P, better_P, term.name))


def _pair_term(name: str, term: Term) -> PairTerm:
    formula = formula_of(name, term)
    if isinstance(term, OwnTerm):
        constants, loss = term.constants, own_loss(term)
    else:
        constants = term.model_dump(exclude={"weight"})
        loss = Bound(formula.loss, **constants)
    return PairTerm(
        name=name,
        loss=loss,
        weight=term.weight,
        beta=constants["beta"] if "beta" in constants else 1.0,
        reference=formula.reference,
        means=formula.means or ("average" in constants and constants["average"]),
    )


def _with_statistics(atoms: Sequence[Atom], config: LossConfig, trainer: Trainer) -> list[Atom]:
    """The atoms (of two rows each) with the statistics of the step that their losses look at."""
    assert all(len(atom.rows) == 2 for atom in atoms), "statistics are of pairs"
    rows = [row for atom in atoms for row in atom.rows]
    logp_R = torch.tensor(_sums(trainer.forward(rows, "logp")["logp"]), dtype=torch.float64)
    ref_R = torch.tensor(_sums([row.columns["ref_logp"] for row in rows]), dtype=torch.float64)
    length_R = torch.tensor([row.trained_count for row in rows], dtype=torch.float64)
    known = SequenceSums(logp_R=logp_R, ref_R=ref_R, length_R=length_R, constants={}, distance={})
    first_P = torch.arange(0, len(rows), 2)
    for kind, term in config.terms.items():
        statistic = formula_of(kind, term).statistic
        if statistic is not None:
            chosen_P, rejected_P = statistic(known.pairs(first_P, first_P + 1, kind))
            atoms = [
                Atom(
                    rows=tuple(row.with_columns(**{f"step/{kind}": x}) for row, x in zip(atom.rows, pair, strict=True))
                )
                for atom, *pair in zip(atoms, chosen_P.tolist(), rejected_P.tolist(), strict=True)
            ]
    return list(atoms)


def _sums(columns: Sequence[Column]) -> list[float]:
    """The sum over each answer's tokens, in double precision."""
    return [float(each.sum(dtype=np.float64)) for each in columns]


# -------------------------------------------------------------------------------------- single answers


@dataclass(frozen=True, slots=True, kw_only=True)
class KTOLoss(Objective):
    """KTO, for each row on its own. Columns: `ref_logp`, and the same for all tokens `weight`, `good`, `baseline`."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: float
    beta: float

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and metrics under TRL's names, as means over good or bad answers."""
        answers = sequence_sums(outputs.logp_T, batch)
        weight_R, good_R, baseline_R = (answers.constants[name] for name in ("weight", "good", "baseline"))
        ratio_R = answers.logp_R - answers.ref_R
        loss_R = self.weight * self.loss(ratio_R, good_R, baseline_R)
        with torch.no_grad():
            tallies = {
                name: Tally(total=(weight_R * value_R).sum(), weight=weight_R.sum())
                for name, value_R in (("loss", loss_R), ("kl", baseline_R))
            }
            for name, mask_R in (("chosen", good_R), ("rejected", 1 - good_R)):
                for what, value_R in (("rewards", self.beta * ratio_R), ("logps", answers.logp_R)):
                    tallies[f"{what}/{name}"] = Tally(total=(mask_R * value_R).sum(), weight=mask_R.sum())
        return (weight_R * loss_R).sum(), {**tallies, **answers.distance}


def beside_mismatched(judged: Sequence[Tokenised[Judged]], max_length: int) -> list[Atom]:
    """Each answer as an atom with the column `good`, and beside it the next answer to another prompt after its own one.

    An answer that would make the row longer than `max_length` is passed over. Raises `DataError` where no foreign
    answer fits after a prompt: a baseline over matched answers would be no baseline.
    """
    rows, found = [each.atom.rows[0] for each in judged], []
    for i, row in enumerate(rows):
        others = (rows[(i + k) % len(rows)] for k in range(1, len(rows)))
        fits = (
            other
            for other in others
            if other.prompt != row.prompt and row.shared + len(other.tokens) - other.shared <= max_length
        )
        other = next(fits, None)
        if other is None:
            raise DataError(
                f"{judged[i].source.origin}: KTO measures its baseline on answers to other prompts, and none fits "
                "after this one; add rows with other prompts, or raise train.max_length"
            )
        trained = np.concatenate([row.trained[: row.shared], other.trained[other.shared :]])
        tokens = np.concatenate([row.tokens[: row.shared], other.tokens[other.shared :]])
        foreign = TokenRow(tokens=tokens, trained=trained, shared=row.shared)
        found.append(add_constant(Atom(rows=(row, foreign)), "good", float(judged[i].source.good)))
    return found


def _with_baseline(batch: Sequence[Atom], trainer: Trainer) -> list[Atom]:
    """The answers alone, with how far the policy is from the reference on the step's mismatched ones.

    That distance, z = max(0, mean of l), is taken over the whole step without gradient, so no split changes it.
    """
    foreign = [atom.rows[1] for atom in batch]
    now, before = trainer.forward(foreign, "logp")["logp"], [row.columns["ref_logp"] for row in foreign]
    baseline = max(0.0, (sum(_sums(now)) - sum(_sums(before))) / len(foreign))
    alone = [Atom(rows=atom.rows[:1]) for atom in batch]
    return [add_constant(add_constant(atom, "baseline", baseline), "weight", 1 / len(alone)) for atom in alone]
