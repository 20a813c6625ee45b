"""The stage of reinforcement learning, and its sections: constraint, curriculum, health."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Literal

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, of_answers
from whet.config.data import Source
from whet.config.environment import EnvironmentConfig
from whet.config.held_out import OwnEvaluation, TrainingStage
from whet.config.lag import LagConfig
from whet.config.policy import BY_GROUP, PolicyConfig
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
from whet.config.strict import Strict
from whet.config.train import RLTrainConfig, SamplingConfig


class ConstraintConfig(Strict):
    """The mean of a reward named `cost` is to be at most `limit`; what it is charged with moves until it is."""

    cost: str
    """Name of the reward: the more of it the worse. It has weight 0, for it is counted here."""
    limit: float
    proportional: float = Field(10.0, ge=0)
    """K_P: what each unit of mean cost - limit adds to the multiplier in its own step; it keeps it from swinging."""
    integral: float = Field(0.2, ge=0)
    """K_I: what each unit adds for good, step after step. Alone it is the textbook's multiplier, which swings."""
    initial_multiplier: float = Field(0.0, ge=0)
    """Initial value of the integral: what one unit of cost is worth in units of reward, if that is known."""
    max_multiplier: float = Field(100.0, gt=0)
    """The multiplier's bound, for a limit that cannot be kept."""

    @model_validator(mode="after")
    def _check(self) -> ConstraintConfig:
        if self.initial_multiplier > self.max_multiplier:
            raise ValueError(
                f"initial_multiplier is {self.initial_multiplier}, above max_multiplier ({self.max_multiplier})"
            )
        if not self.proportional and not self.integral:
            raise ValueError(
                "proportional and integral are both 0, so the price never moves; for a fixed price give the reward a "
                "weight below 0 and leave constraint out"
            )
        return self


SOLVED = "solved"


class CurriculumConfig(Strict):
    """The order of an RL stage's tasks. What is measured: the share of right answers when a task was last played."""

    order_by: str | None = None
    """What makes a task hard: a column with a number (larger is harder), or `solved`, the measured share (in the first
    epoch nothing is known, so it is shuffled as ever). None: no order."""
    buckets: int = Field(4, ge=2)
    """With `order_by`: number of difficulty buckets of an epoch, easiest first; each is shuffled."""
    skip_above: float | None = Field(None, gt=0, le=1)
    """A task of which this share is right, or more, is left out for `skip_steps` steps."""
    skip_below: float | None = Field(None, ge=0, lt=1)
    """The same for this share or less: hopeless for now."""
    skip_steps: int = Field(20, ge=1)
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each step's prompts that are past ones whose answers were some right and some wrong; they are sampled
    anew."""

    @model_validator(mode="after")
    def _check(self) -> CurriculumConfig:
        low, high = self.skip_below, self.skip_above
        if self.order_by is None and low is None and high is None and not self.replay:
            raise ValueError("curriculum changes nothing; set order_by, skip_above, skip_below or replay, or remove it")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"skip_below {low} and skip_above {high} skip every task; leave room between")
        return self

    @property
    def measures(self) -> bool:
        """Whether it needs to know which answers are right."""
        return self.order_by == SOLVED or self.skip_above is not None or self.skip_below is not None or self.replay > 0


Action = Literal["ignore", "warn", "lower", "stop"]
"""warn: a line. lower: the learning rate times `lower_by`. stop: the run ends."""


class HealthConfig(Strict):
    """Lines are drawn through averages over about `window` steps; nothing is found in the first `window` steps."""

    window: int = Field(5, ge=1)
    lower_by: float = Field(0.5, gt=0, lt=1)

    collapse: Action = "warn"
    collapse_below: float = Field(0.5, gt=0, lt=1)
    """The solved share (the reward, where nothing judges) is below this part of its best, which was above 0.02."""

    entropy_loss: Action = "warn"
    entropy_below: float = Field(0.1, gt=0, lt=1)
    """Entropy has fallen below this part of its first value, and less than 0.9 is solved: nothing is tried any more."""

    length_runaway: Action = "warn"
    truncated_above: float = Field(0.5, gt=0, lt=1)
    """More answers than this are cut off, and more than twice as many as at first."""

    no_signal: Action = "warn"
    equal_above: float = Field(0.95, gt=0, lt=1)
    """The share of groups whose rewards are all equal."""

    far_from_reference: Action = "warn"
    kl_above: float = Field(1.0, gt=0)
    """Nats per token, where a KL is measured."""

    clipping: Action = "warn"
    clipped_above: float = Field(0.3, gt=0, lt=1)
    """The share of tokens whose gradient is stopped. GSPO clips about 0.15 when all is well."""

    gap: Action = "warn"
    gap_above: float = Field(0.05, gt=0)
    """Mean |sampler - trainer| log-probability difference; `max_gap` of the stage ends the run."""

    gradient: Action = "warn"
    gradient_above: float = Field(20.0, gt=1)
    """Times the average norm so far, in one step."""


class RLStage(TrainingStage):
    """Reinforcement learning with verifiable rewards: sample, score, weigh, step."""

    kind: Literal["rl"]
    tasks: Source
    environment: EnvironmentConfig | None = None
    """The environment of the tasks; None: each is one question and one answer. A text is short for its `path`."""
    rewards: list[RewardConfig] = Field(default_factory=verified, min_length=1)
    algorithm: PolicyConfig = PolicyConfig()
    constraint: ConstraintConfig | None = None
    curriculum: CurriculumConfig | None = None
    """Which tasks come next; None: all of them, shuffled anew in every epoch."""
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(8, ge=1)
    branches: list[int] = Field(default=[], max_length=8)
    """With credit: tree: in how many ways the first turn is written, in how many the second after each of them, and so
    on; later turns go on one way. Their product is `rollouts_per_prompt`."""
    sampling: SamplingConfig = SamplingConfig()
    evaluation: OwnEvaluation = None
    train: RLTrainConfig = RLTrainConfig()
    health: HealthConfig = HealthConfig()
    lag: LagConfig = LagConfig()
    max_gap: float | None = Field(None, gt=0)
    """Largest mean |sampler - trainer| log-probability difference per token, and a fifth of the largest 99th
    percentile; beyond either the run stops. None: 0.01 nats in float32, 0.1 in bfloat16, 0.5 where an adapter has
    dropout."""

    @model_validator(mode="after")
    def _check(self) -> RLStage:
        if self.train.steps is None:
            raise ValueError("train.steps must be given for RL: there is no epoch to end it")
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens, environment=self.environment is not None)
        pairs = any(isinstance(r, JudgeReward) and r.form == "pairs" for r in self.rewards)
        if pairs and (self.rollouts_per_prompt < 2 or self.algorithm.baseline == "greedy"):
            raise ValueError("rewards: a judge of pairs compares answers to one task; it needs two or more of them")
        if self.algorithm.credit in ("turns", "tree") and self.environment is None:
            credit = self.algorithm.credit
            raise ValueError(f"algorithm.credit: {credit} needs plays of several turns; add environment")
        self._check_branches()
        self._check_algorithm()
        if self.algorithm.objectives == "normalised":
            check_normalised(self.rewards)
        if self.constraint is not None:
            check_cost(self.constraint.cost, self.rewards)
            self._check_constraint()
        if self.curriculum is not None and self.curriculum.measures and not judged(self.rewards):
            raise ValueError(
                "curriculum measures which answers are right, and no reward judges that; add one that does, "
                "or order by a column"
            )
        if self.train.quantize is not None and self.sampling.engine == "vllm":
            raise ValueError("train.quantize and sampling.engine vllm do not go together: vLLM is handed whole weights")
        if self.lag.steps:
            self.algorithm.check_lag(self.lag.steps)
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0 for RL: greedy samples carry no signal")
        if self.sampling.top_p < 1 or self.sampling.top_k is not None:
            raise ValueError(
                "sampling.top_p < 1 or top_k truncates the distribution that the policy gradient differentiates; "
                "use top_p 1 and no top_k for RL"
            )
        return self

    def _check_algorithm(self) -> None:
        """Raise `ValueError` where the stage's numbers or rewards make this point of the space meaningless."""
        algorithm = self.algorithm
        if (algorithm.credit == "process" or algorithm.step_weight) and not any(r.grades_steps for r in self.rewards):
            what = "credit: process" if algorithm.credit == "process" else "step_weight"
            raise ValueError(f"algorithm.{what} needs the grades of steps; add a reward of kind steps or process_model")
        if algorithm.objectives == "normalised" and len(weights(self.rewards)) + (self.constraint is not None) < 2:
            raise ValueError(
                "algorithm.objectives: normalised balances several rewards, and one alone has a weight other than 0; "
                "add another (kind: format, say) or use scale: batch_std with summed"
            )
        if self.rollouts_per_prompt < 2 and algorithm.baseline in BY_GROUP:
            raise ValueError(
                f"rollouts_per_prompt must be at least 2: a group of one has no baseline ({algorithm.baseline}); "
                "or use algorithm.baseline: batch_mean, greedy or none"
            )
        if self.prompts_per_step < 2 and "batch" in algorithm.baseline + algorithm.scale:
            raise ValueError("prompts_per_step must be at least 2: statistics over the batch need more than one group")
        if algorithm.dynamic_sampling and not judged(self.rewards):
            raise ValueError(
                "algorithm.dynamic_sampling asks which answers are right, and no reward judges that (a shaped reward "
                "differs inside an all-right group); add one that does, or set dynamic_sampling: null"
            )
        if algorithm.kl.update_every and self.train.lora is not None:
            raise ValueError(
                "algorithm.kl.update_every cannot update the reference of a LoRA run, which is the model with its "
                "adapter off; set it to null or train all weights"
            )

    def _check_branches(self) -> None:
        """Raise `ValueError` where plays part otherwise than their number and their credit say."""
        if (self.algorithm.credit == "tree") != bool(self.branches):
            raise ValueError(
                "algorithm.credit: tree and branches go together; give both (branches: [4, 2]), or neither"
            )
        if self.branches and (min(self.branches) < 1 or prod(self.branches) != self.rollouts_per_prompt):
            raise ValueError(
                f"branches: {self.branches} make {prod(self.branches)} plays of a prompt, and rollouts_per_prompt is "
                f"{self.rollouts_per_prompt}; their product must be that"
            )

    def _check_constraint(self) -> None:
        """Raise `ValueError` where a constraint on the cost of whole answers could not act on the algorithm."""
        algorithm = self.algorithm
        if algorithm.scale == "group_std" and algorithm.objectives == "summed":
            raise ValueError(
                "constraint: scale: group_std makes a group whose answers differ in nothing but the cost as loud as "
                "any, whatever the multiplier; use algorithm.scale: batch_std, token_std or none"
            )
        if algorithm.dynamic_sampling is not None:
            raise ValueError(
                "constraint: dynamic sampling leaves out groups that are all right, and their answers differ in cost; "
                "set algorithm.dynamic_sampling: null"
            )
        if algorithm.credit == "process" or algorithm.step_weight:
            raise ValueError(
                "constraint: the cost is one of whole answers, and grades of steps are not charged with it"
            )

    @model_validator(mode="after")
    def _check_roles(self) -> RLStage:
        roles = self.train.roles
        if roles is not None and roles.only is not None and self.algorithm.shares_trunk:
            raise ValueError("train.roles.only leaves tokens out whose values a critic learns; set share_trunk: false")
        if roles is not None and roles.angle and self.algorithm.ptx is not None:
            raise ValueError("train.roles.angle is of the policy gradient alone; leave it out, or algorithm.ptx")
        return self

    def budget(self) -> StageBudget:
        """A batch of rollouts a step, drawn up to `rounds` times."""
        prompts, dynamic = self.prompts_per_step, self.algorithm.dynamic_sampling
        updates, rounds = min(self.algorithm.minibatches, prompts), dynamic.rounds if dynamic else 1
        answers = self.rollouts_per_prompt
        return of_answers(self.train.steps, prompts, answers, self.sampling, updates=updates, rounds=rounds)

    def unfit(self, made: Mapping[str, StageBase]) -> Iterator[str]:
        """A critic has one number."""
        critic = self.algorithm.critic
        if critic is not None and critic.model is not None:
            stage = made.get(critic.model.path)
            if isinstance(stage, RewardModelStage) and (stage.several or stage.gate is not None):
                yield f"algorithm.critic.model is {critic.model.path}, which has several objectives and not one number"
