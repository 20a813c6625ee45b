"""The stage that makes a reward model: what it learns from, and how."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.data import GeneratedConfig, Source
from whet.config.stage import StageBase
from whet.config.strict import Made
from whet.config.train import TrainConfig


class RewardModelStage(StageBase):
    """A scalar head on a language model learns which answers, or which steps of an answer, are good."""

    makes: ClassVar[Made | None] = "reward"
    kind: Literal["reward_model"]
    data: Source
    eval_data: Source | None = None
    """Held-out rows; None: a share `hold_out` of `data`."""
    hold_out: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts in `data` that is held out where `eval_data` is not given; a hash of the prompt decides."""
    eval_every: int = Field(50, ge=1)
    """Steps between evaluations on what is held out."""
    learn: Literal["comparisons", "outcomes", "steps"] = "comparisons"
    """comparisons: which of two or more answers is better. outcomes: whether an answer is good (`label`). steps:
    whether each of its steps is (a process reward model)."""
    ranking: Literal["pairs", "plackett_luce"] = "pairs"
    """comparisons: Bradley-Terry over all pairs of a prompt's answers (InstructGPT), or the ranking as one choice."""
    centring: float = Field(0.0, ge=0)
    """comparisons: weight of (r_w + r_l)^2, which keeps scores near zero (0.01 is common)."""
    every_token: bool = False
    """outcomes: the label at every token of the answer (Cobbe et al. 2021), or at its end alone."""
    normalise: Literal["mean", "unit"] = "mean"
    """comparisons: mean: preferred answers of the training data score 0 on average. unit: and all answers have a
    standard deviation of 1. Written into the model's config; whoever reads the raw head does not see it."""
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> RewardModelStage:
        if self.learn != "comparisons" and (self.ranking != "pairs" or self.centring or self.normalise != "mean"):
            raise ValueError(f"ranking, centring and normalise are for comparisons, and learn is {self.learn}")
        if self.learn != "outcomes" and self.every_token:
            raise ValueError(f"every_token is for outcomes, and learn is {self.learn}")
        if self.ranking == "plackett_luce" and self.centring:
            raise ValueError("centring is a term of pairs; leave it out with ranking: plackett_luce")
        if self.learn == "steps" and isinstance(self.data, GeneratedConfig):
            raise ValueError("learn: steps needs rows with graded steps; a stage of kind step_labels makes them")
        return self
