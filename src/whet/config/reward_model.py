"""The stage that makes a reward model: what it learns from, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, answers_of, of_rows
from whet.config.data import GeneratedConfig, Source
from whet.config.held_out import TrainingStage
from whet.config.model import ModelConfig
from whet.config.rewards import ProcessModelReward, RewardConfig, scorers
from whet.config.stage import StageBase
from whet.config.strict import Made
from whet.config.train import TrainConfig

Objective = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""What answers are rated by; it is part of the names of metrics."""


class GateConfig(ModelConfig):
    """A gate over the objectives of a reward model that is there: the prompt decides what each counts for (ArmoRM)."""

    refers_to: ClassVar[Made | None] = "reward"
    hidden: int = Field(1024, ge=0)
    """Width of the one hidden layer between the prompt's last hidden state and the weights; 0: none."""
    temperature: float = Field(10.0, gt=0)
    """What the gate's logits are divided by."""
    debias: str | None = None
    """What is taken off every objective so that none goes with it any more: `length` (tokens of the answer), or an
    objective (verbosity). It is taken off in training, evaluation and use alike."""


class RewardModelStage(TrainingStage):
    """A head on a language model learns which answers, or which steps of an answer, are good, or how good in what."""

    makes: ClassVar[Made | None] = "reward"
    kind: Literal["reward_model"]
    data: Source
    eval_data: Source | None = None
    """Held-out rows; None: a share `hold_out` of `data`."""
    hold_out: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts in `data` that is held out where `eval_data` is not given; a hash of the prompt decides."""
    learn: Literal["comparisons", "ratings", "outcomes", "steps"] = "comparisons"
    """comparisons: which of two or more answers is better. ratings: how good an answer is by each of several
    `objectives`. outcomes: whether an answer is good (`label`). steps: whether each of its steps is (a process reward
    model)."""
    objectives: list[Objective] = []
    """ratings: what the rows rate, in the order of the head's outputs."""
    gate: GateConfig | None = None
    """comparisons: what learns from them is a gate over the objectives of this model, whose own weights stay."""
    ranking: Literal["pairs", "plackett_luce"] = "pairs"
    """comparisons: Bradley-Terry over all pairs of a prompt's answers (InstructGPT), or the ranking as one choice."""
    centring: float = Field(0.0, ge=0)
    """comparisons: weight of (r_w + r_l)^2, which keeps scores near zero (0.01 is common)."""
    every_token: bool = False
    """outcomes: the label at every token of the answer (Cobbe et al. 2021), or at its end alone."""
    normalise: Literal["mean", "unit"] = "mean"
    """comparisons: mean: preferred answers of the training data score 0 on average. unit: and all answers have a
    standard deviation of 1. Written into the model's config; the raw head does not show it."""
    train: TrainConfig = TrainConfig()

    @property
    def start(self) -> ModelConfig | None:
        """Of a gate the model that it weighs the objectives of."""
        return self.model if self.gate is None else self.gate.alone()

    @property
    def measures(self) -> bool:
        """Whether rows are held out."""
        return self.eval_data is not None or self.hold_out > 0

    @property
    def several(self) -> bool:
        """Whether its model has more than one number, so that its user must weigh them."""
        return len(self.objectives) > 1

    @model_validator(mode="after")
    def _check(self) -> RewardModelStage:
        if self.learn != "comparisons" and (self.ranking != "pairs" or self.centring or self.normalise != "mean"):
            raise ValueError(f"ranking, centring and normalise are for comparisons, and learn is {self.learn}")
        if self.train.lora is not None and self.train.lora.routed is not None:
            raise ValueError("train.lora.routed is for models that write calls; leave it out")
        if self.learn != "outcomes" and self.every_token:
            raise ValueError(f"every_token is for outcomes, and learn is {self.learn}")
        if self.learn == "ratings" and not self.objectives:
            raise ValueError("learn: ratings needs the names of what is rated; add objectives: [helpfulness, ...]")
        if self.learn != "ratings" and self.objectives:
            raise ValueError(f"objectives is for ratings, and learn is {self.learn}")
        if self.gate is not None:
            self._check_gate()
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: one of them is named twice")
        if self.ranking == "plackett_luce" and self.centring:
            raise ValueError("centring is a term of pairs; leave it out with ranking: plackett_luce")
        if self.learn == "steps" and isinstance(self.data, GeneratedConfig):
            raise ValueError("learn: steps needs rows with graded steps; a stage of kind step_labels makes them")
        return self

    def _check_gate(self) -> None:
        if self.learn != "comparisons":
            raise ValueError(f"gate learns from comparisons, and learn is {self.learn}")
        if self.model is not None:
            raise ValueError("gate.path is the model that it weighs the objectives of; leave model out")
        if self.train.lora is not None or self.train.quantize is not None:
            raise ValueError("gate leaves the model as it is, so train.lora and train.quantize would change nothing")

    def budget(self) -> StageBudget:
        """Rows of one answer, but for comparisons."""
        return of_rows(self.data, self.train, answers=answers_of(self.data) if self.learn == "comparisons" else 1)

    def unfit(self, made: Mapping[str, StageBase]) -> Iterator[str]:
        """A gate needs a model of several objectives."""
        stage = made.get(self.gate.path) if self.gate is not None else None
        if self.gate is None or not isinstance(stage, RewardModelStage):
            return
        if not stage.several:
            yield f"gate.path is {self.gate.path}, which is not rated by several objectives (learn: ratings)"
        elif self.gate.debias not in (None, "length", *stage.objectives):
            yield f"gate.debias is {self.gate.debias!r}: neither length nor one of {', '.join(stage.objectives)}"


def unfit_rewards(rewards: Sequence[RewardConfig], made: Mapping[str, StageBase]) -> Iterator[str]:
    """What is wrong with the reward models that rewards ask, where an earlier stage makes them."""
    for scorer in scorers(rewards):
        stage, of_steps = made.get(scorer.path), isinstance(scorer, ProcessModelReward)
        if not isinstance(stage, RewardModelStage):
            continue
        if (stage.learn == "steps") is not of_steps:
            kind = "model" if of_steps else "process_model"
            yield f"rewards: {scorer.path} learns {stage.learn}; use kind: {kind} for it"
        objectives = stage.objectives if stage.several else ()
        if problem := misweighed(objectives, scorer.objectives, gated=stage.gate is not None):
            yield f"rewards: {scorer.path} {problem}"
        labels = made.get(getattr(stage.data, "path", ""))
        cut = getattr(labels, "separator", None)
        if isinstance(scorer, ProcessModelReward) and cut not in (None, scorer.separator):
            yield f"rewards: {scorer.path} learns steps that end with {cut!r}; give separator: {cut!r}"


def misweighed(objectives: Sequence[str], weights: Mapping[str, float], *, gated: bool) -> str | None:
    """What is wrong with these weights for a reward model of these objectives (none: it has one score)."""
    named = ", ".join(objectives)
    if weights and (gated or not objectives):
        return f"has {'a gate that weighs its objectives' if gated else 'one score'}; leave objectives out"
    if objectives and not gated and not weights:
        return f"has several objectives and no gate; say in objectives what counts how much: {named}"
    unknown = next((name for name in weights if name not in objectives), None)
    return None if unknown is None else f"has no objective {unknown!r}; it has {named}"
