"""The recipe: one pydantic tree for YAML, the command line and Python.

Unknown keys are errors everywhere. A recipe's `model`, `train` and `sampling` sections are defaults that every
stage inherits and may override key by key (`loading.inherit`); after loading, each stage stands alone.

Defaults are published settings, named in `docs/`. Units are in the names: `_s` seconds, `_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.constraint import ConstraintConfig
from whet.config.curriculum import CurriculumConfig
from whet.config.data import Source, Sources
from whet.config.data import weights as weights_of_sets
from whet.config.feedback import AgreementStage, CompareStage, QuestionsStage, ReviseStage, StepLabelsStage
from whet.config.health import HealthConfig
from whet.config.model import ModelConfig
from whet.config.online_preference import OnlinePreferenceStage
from whet.config.policy import PolicyConfig
from whet.config.preference import PreferenceStage
from whet.config.references import references
from whet.config.reward_model import RewardModelStage, misweighed
from whet.config.rewards import (
    JudgeReward,
    ProcessModelReward,
    RewardConfig,
    check_cost,
    check_normalised,
    check_rewards,
    judged,
    scorers,
    weights,
)
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict
from whet.config.train import RLTrainConfig, SamplingConfig, SaveConfig, TrainConfig


class SFTStage(StageBase):
    """Supervised fine-tuning on conversations, prompt-completion pairs or text."""

    makes: ClassVar[Made | None] = "model"
    kind: Literal["sft"]
    data: Sources
    """A data set, or a list of them, which may have weights."""
    eval_data: Source | None = None
    eval_every: int = Field(50, ge=1)
    """Steps between evaluation losses, where `eval_data` is given."""
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> SFTStage:
        weights_of_sets(self.data)
        return self


class RLStage(StageBase):
    """Reinforcement learning with verifiable rewards: sample, score, weigh, step."""

    makes: ClassVar[Made | None] = "model"
    kind: Literal["rl"]
    tasks: Source
    rewards: list[RewardConfig] = Field(min_length=1)
    algorithm: PolicyConfig = PolicyConfig()
    constraint: ConstraintConfig | None = None
    curriculum: CurriculumConfig | None = None
    """Which tasks come next; None: all of them, shuffled anew in every epoch."""
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(8, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    train: RLTrainConfig = RLTrainConfig()
    health: HealthConfig = HealthConfig()
    max_gap: float = Field(0.5, gt=0)
    """Largest mean |sampler - trainer| log-probability difference per token; beyond it the run stops."""

    @model_validator(mode="after")
    def _check(self) -> RLStage:
        if self.train.steps is None:
            raise ValueError("train.steps must be given for RL: there is no epoch to end it")
        check_rewards(self.rewards)
        pairs = any(isinstance(r, JudgeReward) and r.form == "pairs" for r in self.rewards)
        if pairs and (self.rollouts_per_prompt < 2 or self.algorithm.baseline == "greedy"):
            raise ValueError("rewards: a judge of pairs compares answers to one task; it needs two or more of them")
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
        if self.algorithm.kl.renew_every and "back" in self.health.model_dump().values():
            raise ValueError("health: back cannot undo a renewed reference; leave algorithm.kl.renew_every out")
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


class EvalStage(StageBase):
    """Sampled accuracy of several models on the same held-out tasks, with paired intervals."""

    kind: Literal["eval"]
    models: dict[str, str] = {}
    """Label: a model path, `@stage` or `@model` (what the recipe starts from). Empty: the model of the stage before."""
    baseline: str | None = None
    """Label of the model that the others' gains are over; None: the first one."""
    tasks: Source
    rewards: list[RewardConfig] = Field(min_length=1)
    samples: int = Field(4, ge=1)
    """Completions of each task."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> EvalStage:
        check_rewards(self.rewards)
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline!r}, which is none of the labels in models")
        return self


Stage = Annotated[
    SFTStage
    | PreferenceStage
    | OnlinePreferenceStage
    | RewardModelStage
    | RLStage
    | EvalStage
    | CompareStage
    | ReviseStage
    | QuestionsStage
    | AgreementStage
    | StepLabelsStage,
    Field(discriminator="kind"),
]

INHERITED = ("train", "sampling")
"""Sections that a recipe file may have at its top, as defaults of its stages; they are no fields of `Recipe`."""


NOUNS: dict[Made, str] = {"model": "stage", "reward": "reward_model stage", "rows": "stage that makes rows"}
"""What a reference must name, in words."""


class Recipe(Strict):
    """One file, one pipeline: named stages in order, each starting from what the one before made."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = 0
    out: Path | None = None
    """Run folder; None: `runs/NAME`."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads; auto: whichever of one and all cores is faster on the run's own shapes at this moment."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Who hears the numbers of every step beside the log files: tensorboard (`RUN/tensorboard`), W&B or trackio."""
    model: ModelConfig
    save: SaveConfig = SaveConfig()
    stages: dict[str, Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        made: dict[Made, list[str]] = {"model": ["model"], "reward": [], "rows": []}
        for name, stage in self.stages.items():
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"stage name {name!r} must be letters, digits, - and _")
            if name == "model":
                raise ValueError("stage name 'model' is taken: @model means what the recipe starts from")
            found = list(references(stage))
            if isinstance(stage, EvalStage):
                found += [(f"models.{label}", path, "model") for label, path in stage.models.items() if path[:1] == "@"]
            for key, path, what in found:
                if path[1:] not in made[what]:
                    earlier = ", ".join(f"@{other}" for other in made[what] if other != "model") or "none"
                    raise ValueError(f"stages.{name}.{key} is {path}, which is no earlier {NOUNS[what]} ({earlier})")
            for problem in self._unfit(stage):
                raise ValueError(f"stages.{name}.{problem}")
            if stage.makes is not None:
                made[stage.makes].append(name)
        return self

    def _unfit(self, stage: Stage) -> Iterator[str]:
        """What is wrong with the reward models of this recipe that the stage uses, each found to exist before."""
        for scorer in scorers(getattr(stage, "rewards", [])):
            if (made := self._reward_model(scorer.path)) is not None:
                of_steps = made.learn == "steps"
                if of_steps is not isinstance(scorer, ProcessModelReward):
                    kind = "process_model" if of_steps else "model"
                    yield f"rewards: {scorer.path} learns {made.learn}; use kind: {kind} for it"
                objectives = made.objectives if made.several else ()
                if problem := misweighed(objectives, scorer.objectives, gated=made.gate is not None):
                    yield f"rewards: {scorer.path} {problem}"
                cut = self._cut_at(made)
                if isinstance(scorer, ProcessModelReward) and cut not in (None, scorer.separator):
                    yield f"rewards: {scorer.path} learns steps that end with {cut!r}; give separator: {cut!r}"
        critic = stage.algorithm.critic if isinstance(stage, RLStage) else None
        if critic is not None and critic.model is not None:
            made = self._reward_model(critic.model.path)
            if made is not None and (made.several or made.gate is not None):
                yield f"algorithm.critic.model is {critic.model.path}, which has several objectives and not one number"
        if isinstance(stage, RewardModelStage) and stage.gate is not None:
            made, against = self._reward_model(stage.gate.path), stage.gate.debias
            if made is not None and not made.several:
                yield f"gate.path is {stage.gate.path}, which is not rated by several objectives (learn: ratings)"
            elif made is not None and against not in (None, "length", *made.objectives):
                yield f"gate.debias is {against!r}: neither length nor one of {', '.join(made.objectives)}"

    def _cut_at(self, made: RewardModelStage) -> str | None:
        """The separator of the step labels that a process reward model learns from, where this recipe makes them."""
        path = getattr(made.data, "path", "")
        labels = self.stages.get(path[1:]) if path.startswith("@") else None
        return labels.separator if isinstance(labels, StepLabelsStage) else None

    def _reward_model(self, path: str) -> RewardModelStage | None:
        """The stage of this recipe that makes the reward model at a path."""
        stage = self.stages.get(path[1:]) if path.startswith("@") else None
        return stage if isinstance(stage, RewardModelStage) else None
