"""Online preference optimisation: the policy's own answers, ranked by rewards, are the comparisons."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, of_answers
from whet.config.data import Source
from whet.config.held_out import OwnEvaluation, TrainingStage
from whet.config.model import Reference
from whet.config.preference import LossConfig, PreferenceTrainConfig, TrainAtRateOfLoss
from whet.config.rewards import RewardConfig, check_rewards, verified
from whet.config.train import SamplingConfig


class OnlinePreferenceStage(TrainingStage):
    """Sample answers, rank them by their rewards, prefer the best over the worst, and again (online, iterative DPO)."""

    kind: Literal["online_preference"]
    tasks: Source
    rewards: list[RewardConfig] = Field(default_factory=verified, min_length=1)
    loss: LossConfig = LossConfig(preset="dpo")
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Of a prompt's answers: the best against the worst, or every pair of different rewards (one answer of each)."""
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(4, ge=2)
    minibatches: int = Field(1, ge=1)
    """Optimizer steps for one batch of answers."""
    reference: Reference = None
    """What the loss compares with; None: the model that the stage starts from."""
    update_reference_every: int | None = Field(None, ge=1)
    """Steps after which the reference becomes the policy as it is (1: always the iterate before); None: it stays what
    it was."""
    max_reference_gap: float = Field(0.02, gt=0)
    """Largest mean |log p - log p_ref| per token before the first update, when the two must be the same model."""
    sampling: SamplingConfig = SamplingConfig()
    evaluation: OwnEvaluation = None
    train: TrainAtRateOfLoss = PreferenceTrainConfig()

    @model_validator(mode="after")
    def _check(self) -> OnlinePreferenceStage:
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens)
        if self.reference is not None and not self.loss.needs_reference:
            raise ValueError("reference has no effect, the loss has none; leave it out")
        if self.train.steps is None:
            raise ValueError("train.steps must be given where answers are sampled: there is no epoch to end it")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy answers to a prompt are all the same")
        if self.loss.kto is not None:
            raise ValueError("kto is of single answers called good or bad; rewards rank answers: use a loss of pairs")
        if self.loss.pairs_only and self.pairs == "all":
            raise ValueError(self.loss.why_pairs)
        if self.update_reference_every is not None and not self.loss.needs_reference:
            raise ValueError("update_reference_every has no effect, the loss has no reference; leave it out")
        if self.update_reference_every is not None and self.train.lora is not None:
            raise ValueError(
                "update_reference_every cannot update the reference of a LoRA run, which is the model with its "
                "adapter off; set it to null or train all weights"
            )
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"prompts_per_step is {self.prompts_per_step}, too few for minibatches {self.minibatches}: each update "
                "takes whole prompts"
            )
        return self

    def budget(self) -> StageBudget:
        """A batch of answers a step."""
        prompts, answers = self.prompts_per_step, self.rollouts_per_prompt
        return of_answers(self.train.steps, prompts, answers, self.sampling, updates=self.minibatches)
