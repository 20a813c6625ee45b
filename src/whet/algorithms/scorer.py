"""A reward model at work: conversations in, numbers out that mean what the model's config says they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whet.envs.clients import Passage, ScoreReading
from whet.errors import DataError
from whet.models.heads import RewardFacts
from whet.records import TokenRow
from whet.templates.base import Template
from whet.training.answers import read_at
from whet.training.base import Trainer
from whet.training.gate import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScorer:
    """`Scorer` over a trainer that is never trained: it batches, shares prompts and keeps to its memory."""

    trainer: Trainer
    template: Template
    """The reward model's own."""
    max_length: int
    facts: RewardFacts
    objectives: tuple[str, ...] = ()
    """The names of the head's outputs where there are several."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each objective counts for, where no gate decides."""

    def read(self, passages: Sequence[Passage]) -> list[ScoreReading]:
        """One reading of each passage; what cannot be written, is too long or has no number is a failure."""
        rows = [self._row(passage) for passage in passages]
        writable = [row for row in rows if isinstance(row, TokenRow)]
        scored = iter(self.trainer.forward(writable, "score")["score"])
        return [
            self._reading(next(scored).tolist()) if isinstance(row, TokenRow) else ScoreReading(scores=(), failure=row)
            for row in rows
        ]

    def _reading(self, read: Sequence[Sequence[float]]) -> ScoreReading:
        """What the raw scores mean. A NaN is said here: `min` passes it over, and a comparison makes it a number."""
        wrong = next((score for outputs in read for score in outputs if not math.isfinite(score)), None)
        if wrong is not None:
            return ScoreReading(scores=(), failure=f"the reward model says {wrong}")
        if not self.objectives:
            return ScoreReading(scores=tuple(self._meant(score) for (score,) in read))
        if self.facts.gate is None:
            said = [dict(zip(self.objectives, outputs, strict=True)) for outputs in read]
            scores = (sum(weight * each[name] for name, weight in self.weights.items()) for each in said)
            return ScoreReading(scores=tuple(scores), parts=said[-1])
        names = (*self.objectives, *(f"gate/{name}" for name in self.objectives))
        parts = dict(zip(names, read[-1][1:], strict=True))
        return ScoreReading(scores=tuple(self._meant(score) for score, *_ in read), parts=parts)

    def _row(self, passage: Passage) -> TokenRow | str:
        try:
            return read_at(passage.messages, passage.ends, self.template, max_length=Window(self.max_length))
        except DataError as error:
            return f"the reward model cannot read it: {error}"

    def _meant(self, score: float) -> float:
        if self.facts.link == "sigmoid":
            return 1 / (1 + math.exp(-score)) if score > -700 else 0.0
        return (score - self.facts.mean) / self.facts.std
