"""Distillation: a student learns its teacher's distribution at every token, of given rows and of its own answers.

The rows of a data set have the teacher's likeliest tokens as columns already; those of answers that the student has
just sampled are read by the teacher, a frozen model of the trainer (GKD 2306.13649, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from torch import Tensor

from whet.algorithms.groups import measure_groups, measure_taken, to_atoms, to_rows
from whet.algorithms.sft import weigh_again
from whet.algorithms.supervised import Drawn, drawn_from, updates
from whet.config import TrainConfig
from whet.data.mixture import Blend
from whet.formulas.distill import with_tail
from whet.records import Atom, Step, seed_of
from whet.rollouts.feed import Feed
from whet.training.base import TEACHER, Batch, Need, Objective, Outputs, Tally, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Objective):
    """The divergence of the student from its teacher at each token. Columns: `top_k/ids`, `top_k/logp`."""

    divergence: Callable[[Tensor, Tensor], Tensor]
    temperature: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"logp", "top_k"})

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted divergence; and as means over tokens it, -log p of the tokens, and the teacher's tail."""
        assert outputs.top_k_TK is not None, "it was asked for"
        teacher_TB = with_tail(batch.columns["top_k/logp"])
        loss_T = self.divergence(with_tail(outputs.top_k_TK), teacher_TB)
        measured = {"loss": loss_T.detach(), "nll": -outputs.logp_T.detach(), "teacher/tail": teacher_TB[:, -1].exp()}
        count = batch.weight_T.new_tensor(len(loss_T))
        tallies = {name: Tally(total=value.sum(), weight=count) for name, value in measured.items()}
        return (batch.weight_T * loss_T).sum(), tallies


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAnswers:
    """Where a student's own answers come from, and how the teacher reads them."""

    feed: Feed
    prompts_per_step: int
    top_k: int
    share: float
    """Of optimizer steps that learn from them; the others learn from given rows."""

    def chosen(self, step: int) -> bool:
        """Whether the step (from 0) learns from own answers."""
        return Random(seed_of(self.feed.seed, "on policy", step)).random() < self.share

    def draw(self, trainer: Trainer, temperature: float, step: int) -> Drawn:
        """The answers of the student as it is, with what the teacher says of their tokens."""
        self.feed.publish(step)
        taken = self.feed.take(self.prompts_per_step, step=step)
        episodes = [episode for group in taken.groups for episode in group.episodes]
        rows = [replace(row, columns={}) for episode in episodes for row in to_rows(episode)]
        read = trainer.forward(rows, "top_k", temperature=temperature, frozen=TEACHER, top_k=self.top_k)
        said = [row.with_columns(**{name: read[name][i] for name in read}) for i, row in enumerate(rows)]
        return Drawn(
            atoms=to_atoms(said),
            groups=taken.played,
            metrics={**measure_groups(taken.played), **measure_taken(taken, 0.0)},
            sampling_s=taken.rollout_s + taken.score_s,
        )


def distill(
    trainer: Trainer,
    atoms: Sequence[Atom],
    own: OwnAnswers | None,
    objective: Distillation,
    config: TrainConfig,
    *,
    steps: int,
    seed: int,
    blend: Blend | None = None,
    start: int = 0,
    state: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """One `Step` for each optimizer step from `start` on: on `batch_size` of the atoms, or on answers of its `own`.

    `blend`: of which sets the atoms are; None: one. `state` is what the `Step` before `start` carried.
    """

    def draw(step: int) -> Drawn:
        if own is not None and own.chosen(step):
            drawn = own.draw(trainer, objective.temperature, step)
        else:
            drawn = drawn_from(atoms, blend, config, seed, step)
        return drawn if own is None else replace(drawn, state=own.feed.state)

    return updates(trainer, draw, weigh_again, objective, config, steps=steps, start=start, state=state)
