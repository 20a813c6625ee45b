"""Reward models: a scalar head learns to compare answers, or to judge an answer or each of its steps.

A comparison is an atom of K rows, the best answer first, each with its last token alone trained: the score is read
there, and one forward pass serves all C(K, 2) pairs (InstructGPT 2203.02155, section 3.5). A judged answer is a row
with a column `label` at the tokens where it holds: the last, every one, or those that end a step. A rated answer is
read at its end and has a column for each objective.

Legend: R rows of a micro-batch, P pairs of all its rankings, T labelled tokens, K objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from typing import ClassVar, Literal

import torch
from torch import Tensor

from whet.algorithms.sequence_sums import add_constant, pairs_of
from whet.algorithms.supervised import supervised
from whet.config.reward_model import RewardModelStage
from whet.data.base import Comparison, Judged, Rated, Stepwise
from whet.formulas import reward as formulas
from whet.formulas.step import sequence_mean, token_mean
from whet.models.heads import Scale
from whet.records import Atom, Step
from whet.training.answers import Tokenised, ends_only
from whet.training.base import Batch, Need, Objective, Outputs, Tally, Trainer

Ranking = Literal["pairs", "plackett_luce"]


def reward_model(
    trainer: Trainer,
    examples: Sequence[Atom],
    config: RewardModelStage,
    *,
    seed: int,
    start: int = 0,
    state: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on; the examples are what the functions below make.

    `state` is what the `Step` before `start` carried.
    """
    objective, weigh = objective_of(config), partial(weighed, config=config)
    return supervised(trainer, examples, weigh, objective, config.train, seed=seed, start=start, state=state)


def objective_of(config: RewardModelStage) -> Objective:
    """What a stage teaches, as a value."""
    if config.learn == "comparisons":
        return RankingLoss(ranking=config.ranking, centring=config.centring)
    return RatingLoss(objectives=tuple(config.objectives)) if config.learn == "ratings" else LabelLoss()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingLoss(Objective):
    """The better answer scores higher. Columns, at the better row of each pair: `margin`, `confidence`."""

    ranking: Ranking = "pairs"
    centring: float = 0.0
    """Weight of (r_w + r_l)^2 of each pair."""
    needs: ClassVar[frozenset[Need]] = frozenset({"score"})
    compares: ClassVar[bool] = True

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss; as metrics the means over pairs of the loss, of who won and of by how much."""
        assert outputs.score_TK is not None and len(outputs.score_TK) == batch.rows, "one score for each answer"
        score_R = outputs.score_TK[:, 0]
        better_P, worse_P = pairs_of(batch.atom_R)
        difference_P = (score_R[better_P] - score_R[worse_P]).detach()
        weight_P = batch.weight_T[better_P]
        if self.ranking == "pairs":
            loss_P = formulas.bradley_terry(
                score_R[better_P],
                score_R[worse_P],
                margin_P=batch.columns["margin"][better_P],
                confidence_P=batch.columns["confidence"][better_P],
            )
            if self.centring:
                loss_P = loss_P + self.centring * formulas.centring(score_R[better_P], score_R[worse_P])
            loss, share = (weight_P * loss_P).sum(), weight_P.sum()
        else:
            answers = torch.bincount(batch.atom_R).tolist()
            loss_R = torch.cat([formulas.plackett_luce(score_K) for score_K in score_R.split(answers)])
            loss = (batch.weight_T * loss_R).sum()
            share = (batch.weight_T / torch.bincount(batch.atom_R)[batch.atom_R]).sum()  # of the step's rankings
        measured = {"accuracy": difference_P > 0, "ties": difference_P == 0, "margin": difference_P}
        tallies = {
            name: Tally(total=(weight_P * value).sum(), weight=weight_P.sum()) for name, value in measured.items()
        }
        tallies["loss"] = Tally(total=loss.detach(), weight=share)
        tallies["score"] = Tally(total=score_R.detach().sum(), weight=score_R.new_tensor(batch.rows))
        return loss, tallies


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelLoss(Objective):
    """The score's sigmoid is the probability of the column `label`."""

    needs: ClassVar[frozenset[Need]] = frozenset({"score"})

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, its mean, and how many labels the score is on the right side of."""
        assert outputs.score_TK is not None, "the engine gives what is needed"
        score_T, label_T, weight_T = outputs.score_TK[:, 0], batch.columns["label"], batch.weight_T
        loss_T = formulas.label_loss(score_T, label_T)
        right_T = (score_T.detach() > 0) == (label_T > 0.5)
        return (weight_T * loss_T).sum(), {
            "loss": Tally(total=(weight_T * loss_T.detach()).sum(), weight=weight_T.sum()),
            "accuracy": Tally(total=(weight_T * right_T).sum(), weight=weight_T.sum()),
            "score": Tally(total=(weight_T * score_T.detach()).sum(), weight=weight_T.sum()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingLoss(Objective):
    """Each output is the rating by its objective. Columns `rating/NAME`: NaN: not rated."""

    objectives: tuple[str, ...]
    needs: ClassVar[frozenset[Need]] = frozenset({"score"})

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted squared errors; as metrics their mean over all ratings, and over those of each objective."""
        assert outputs.score_TK is not None, "the engine gives what is needed"
        rating_TK = torch.stack([batch.columns[f"rating/{name}"] for name in self.objectives], dim=1)
        loss_TK = formulas.rating_loss(outputs.score_TK, rating_TK)
        loss_K = (batch.weight_T[:, None] * loss_TK).sum(0)
        weight_K = (batch.weight_T[:, None] * rating_TK.isfinite()).sum(0)
        named = zip(self.objectives, loss_K.detach(), weight_K, strict=True)
        tallies = {f"loss/{name}": Tally(total=loss, weight=weight) for name, loss, weight in named}
        return loss_K.sum(), {"loss": Tally(total=loss_K.detach().sum(), weight=weight_K.sum()), **tallies}


# ----------------------------------------------------------------------------------------------- examples


def comparison(compared: Tokenised[Comparison]) -> Atom:
    """The answers, each read at its end, with what the row says of how much and how surely the first is better."""
    atom = add_constant(ends_only(compared.atom), "margin", compared.source.margin or 0.0)
    return add_constant(atom, "confidence", compared.source.confidence)


def judged(answer: Tokenised[Judged], *, every_token: bool) -> Atom:
    """The answer with its label at the end, or at each of its tokens."""
    atom = answer.atom if every_token else ends_only(answer.atom)
    return add_constant(atom, "label", float(answer.source.good))


def stepped(answer: Tokenised[Stepwise]) -> Atom:
    """The answer with a label at the end of each of its steps that has one."""
    (row,) = answer.atom.rows
    return Atom(rows=(row.with_columns(label=[label for label in answer.source.labels if label is not None]),))


def rated(answer: Tokenised[Rated], objectives: Sequence[str]) -> Atom:
    """The answer, read at its end, with its rating by each objective, NaN where there is none."""
    atom = ends_only(answer.atom)
    for name in objectives:
        atom = add_constant(atom, f"rating/{name}", answer.source.ratings.get(name, nan))
    return atom


def scaled(atom: Atom, scales: Mapping[str, Scale]) -> Atom:
    """A rated answer with its ratings in standard deviations from their mean."""
    for name, scale in scales.items():
        rating = atom.rows[0].columns[f"rating/{name}"].item()
        atom = add_constant(atom, f"rating/{name}", (rating - scale.mean) / scale.std)
    return atom


def weighed(examples: Sequence[Atom], *, config: RewardModelStage) -> list[Atom]:
    """The examples of one optimizer step, their weights written over all of it.

    Every ranking counts the same, its pairs share its weight; so does every judged answer, every labelled step, and
    every rating, whichever objective it is by.
    """
    if config.learn == "comparisons":
        pairs = config.ranking == "pairs"
        return [add_constant(atom, "weight", _share(len(atom.rows), pairs=pairs) / len(examples)) for atom in examples]
    if config.learn == "ratings":
        columns = [atom.rows[0].columns[f"rating/{name}"] for atom in examples for name in config.objectives]
        ratings = sum(isfinite(rating.item()) for rating in columns)
        return [add_constant(atom, "weight", 1 / ratings) for atom in examples]
    lengths = [atom.rows[0].trained_count for atom in examples]
    weights = token_mean(lengths) if config.learn == "steps" else sequence_mean(lengths)
    return [add_constant(atom, "weight", weight) for atom, weight in zip(examples, weights, strict=True)]


def _share(answers: int, *, pairs: bool) -> float:
    return 2 / (answers * (answers - 1)) if pairs else 1.0
