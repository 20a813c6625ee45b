"""The stage of reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, times
from whet.config.constraint import ConstraintConfig
from whet.config.curriculum import CurriculumConfig
from whet.config.data import Source
from whet.config.environment import EnvironmentConfig
from whet.config.health import HealthConfig
from whet.config.held_out import OwnEvaluation, TrainingStage
from whet.config.policy import PolicyConfig
from whet.config.reward_model import RewardModelStage
from whet.config.rewards import (
    JudgeReward,
    RewardConfig,
    check_cost,
    check_normalised,
    check_rewards,
    judged,
    verified,
    weights,
)
from whet.config.stage import StageBase
from whet.config.strict import Made
from whet.config.train import RLTrainConfig, SamplingConfig


class RLStage(TrainingStage):
    """Reinforcement learning with verifiable rewards: sample, score, weigh, step."""

    makes: ClassVar[Made | None] = "model"
    kind: Literal["rl"]
    tasks: Source
    environment: EnvironmentConfig | None = None
    """Tools, and who answers; None: every task is one question and one answer. A text is short for its `path`."""
    rewards: list[RewardConfig] = Field(default_factory=verified, min_length=1)
    algorithm: PolicyConfig = PolicyConfig()
    constraint: ConstraintConfig | None = None
    curriculum: CurriculumConfig | None = None
    """Which tasks come next; None: all of them, shuffled anew in every epoch."""
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(8, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    evaluation: OwnEvaluation = None
    train: RLTrainConfig = RLTrainConfig()
    health: HealthConfig = HealthConfig()
    max_gap: float | None = Field(None, gt=0)
    """Largest mean |sampler - trainer| log-probability difference per token, and a fifth of the largest 99th
    percentile; beyond either the run stops. None: 0.01 nats in float32, 0.1 in bfloat16, 0.5 where an adapter has
    dropout."""

    @model_validator(mode="after")
    def _check(self) -> RLStage:
        if self.train.steps is None:
            raise ValueError("train.steps must be given for RL: there is no epoch to end it")
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens, environment=self.environment is not None)
        self.check_best(measures=self.evaluation is not None)
        pairs = any(isinstance(r, JudgeReward) and r.form == "pairs" for r in self.rewards)
        if pairs and (self.rollouts_per_prompt < 2 or self.algorithm.baseline == "greedy"):
            raise ValueError("rewards: a judge of pairs compares answers to one task; it needs two or more of them")
        if self.algorithm.credit == "turns" and self.environment is None:
            raise ValueError("algorithm.credit: turns needs plays of several turns; add environment, or use outcome")
        self.algorithm.check_step(
            prompts=self.prompts_per_step,
            rollouts=self.rollouts_per_prompt,
            objectives=len(weights(self.rewards)) + (self.constraint is not None),
            judged=judged(self.rewards),
            graded_steps=any(r.grades_steps for r in self.rewards),
            lora=self.train.lora is not None,
        )
        if self.algorithm.objectives == "normalised":
            check_normalised(self.rewards)
        if self.constraint is not None:
            check_cost(self.constraint.cost, self.rewards)
            self.algorithm.check_constrained()
        if self.curriculum is not None and self.curriculum.measures and not judged(self.rewards):
            raise ValueError(
                "curriculum measures which answers are right, and no reward judges that; add one that does, "
                "or order by a column"
            )
        if self.train.quantize is not None and self.sampling.engine == "vllm":
            raise ValueError("train.quantize and sampling.engine vllm do not go together: vLLM is handed whole weights")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0 for RL: greedy samples carry no signal")
        if self.sampling.top_p < 1 or self.sampling.top_k is not None:
            raise ValueError(
                "sampling.top_p < 1 or top_k truncates the distribution that the policy gradient differentiates; "
                "use top_p 1 and no top_k for RL"
            )
        return self

    def budget(self) -> StageBudget:
        """A batch of rollouts a step, drawn up to `rounds` times."""
        dynamic = self.algorithm.dynamic_sampling
        return StageBudget(
            steps=self.train.steps,
            optimizer_steps=times(self.train.steps, min(self.algorithm.minibatches, self.prompts_per_step)),
            prompts=self.prompts_per_step,
            sequences=self.prompts_per_step * self.rollouts_per_prompt,
            tokens_each=self.sampling.max_tokens,
            rounds=dynamic.rounds if dynamic else 1,
        )

    def unfit(self, made: Mapping[str, StageBase]) -> Iterator[str]:
        """A critic has one number."""
        critic = self.algorithm.critic
        if critic is not None and critic.model is not None:
            stage = made.get(critic.model.path)
            if isinstance(stage, RewardModelStage) and (stage.several or stage.gate is not None):
                yield f"algorithm.critic.model is {critic.model.path}, which has several objectives and not one number"
