"""The stage of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from whet.config.budget import StageBudget, of_rows
from whet.config.data import Source, Sources, weights
from whet.config.held_out import OtherEvaluation, TrainingStage
from whet.config.train import TrainConfig


class SFTStage(TrainingStage):
    """Supervised fine-tuning on conversations, prompt-completion pairs or text."""

    learns_from: ClassVar[str | None] = "answers"
    kind: Literal["sft"]
    data: Sources
    """A data set, or a list of them, which may have weights."""
    eval_data: Source | None = None
    """Rows whose loss is measured (`eval_loss`)."""
    evaluation: OtherEvaluation = None
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> SFTStage:
        weights(self.data)
        return self

    def budget(self) -> StageBudget:
        """An answer a row."""
        return of_rows(self.data, self.train, answers=1)
