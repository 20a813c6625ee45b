"""The stage of distillation: a student learns the distributions of a teacher with the same tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Lt
from pydantic import Field, model_validator

from whet.config.budget import StageBudget, of_answers, of_rows
from whet.config.data import Source, Sources, weights
from whet.config.derived import OneOf
from whet.config.held_out import OwnEvaluation, TrainingStage
from whet.config.model import TeacherConfig
from whet.config.rewards import RewardConfig, check_rewards
from whet.config.shaping import RepetitionReward
from whet.config.train import SamplingConfig, TrainConfig
from whet.formulas.distill import DIVERGENCES

ON_POLICY, BETA = 0.5, 0.5
"""Defaults. A resolved recipe has them written out, also where they have no effect."""


class DistillStage(TrainingStage):
    """A student imitates its teacher's distribution at every token, of given rows (`data`), of answers that it samples
    itself (`tasks`), or of both in turn (GKD 2306.13649). The teacher has the same tokenizer."""

    kind: Literal["distill"]
    teacher: TeacherConfig
    """Whose distributions are imitated: a hub id, a directory or `@stage`."""
    data: Sources | None = None
    """Given rows. What the teacher says of them is computed once and kept in the stage's folder."""
    tasks: Source | None = None
    """Prompts that the student answers itself (on-policy); the teacher reads every answer."""
    on_policy: float = Field(ON_POLICY, gt=0, lt=1)
    """Of a stage with both: the share of optimizer steps on the student's own answers (GKD's lambda)."""
    divergence: Annotated[str, OneOf(DIVERGENCES)] = "forward_kl"
    """forward_kl: KL(teacher || student). reverse_kl: KL(student || teacher). jsd: between the two, by `beta`."""
    beta: Annotated[float, Gt(0), Lt(1)] = BETA
    """Of jsd: the share of the teacher in the mixture. Its ends are forward_kl and reverse_kl."""
    temperature: float = Field(1.0, gt=0)
    """What the logits of both are divided by. The loss is not multiplied by its square: nothing is added to it."""
    top_k: int = Field(64, ge=1)
    """The teacher's likeliest tokens that are kept; all others are one more. All tokens of a smaller vocabulary."""
    eval_data: Source | None = None
    rewards: list[RewardConfig] = Field([RepetitionReward(kind="repetition")], min_length=1)
    """What is measured of the student's own answers; nothing is learned from it."""
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    evaluation: OwnEvaluation = None
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> DistillStage:
        if self.data is None and self.tasks is None:
            raise ValueError("data or tasks must be given: rows to imitate on, or prompts for the student to answer")
        if self.on_policy != ON_POLICY and (self.data is None or self.tasks is None):
            raise ValueError("on_policy mixes given rows with own answers; give both data and tasks, or leave it out")
        if self.beta != BETA and self.divergence != "jsd":
            raise ValueError(f"beta has no effect with divergence: {self.divergence}; use divergence: jsd")
        if self.tasks is not None and self.train.steps is None:
            raise ValueError("train.steps must be given where answers are sampled: there is no epoch to end it")
        if self.data is not None:
            weights(self.data)
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens)
        return self

    def budget(self) -> StageBudget:
        """Rows, or answers that are sampled: whichever a step has."""
        if self.data is not None:
            return of_rows(self.data, self.train, answers=1)
        return of_answers(self.train.steps, self.prompts_per_step, self.rollouts_per_prompt, self.sampling)
