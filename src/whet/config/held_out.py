"""Held-out data of a stage that trains: which tasks are played on the way, and what follows from the results."""

from __future__ import annotations

from math import isnan
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from whet.config.budget import StageBudget, rows_of, times
from whet.config.data import Source
from whet.config.rewards import RewardConfig, check_rewards
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict, path_of
from whet.config.train import SamplingConfig

HELD_OUT = ("eval_data", "evaluation")
"""Keys of a stage that have held-out rows or tasks."""


class BestConfig(Strict):
    """Keep the model that is best on held-out data, and stop early where none is better for a while."""

    metric: str = Field(pattern="^eval_.")
    """What is compared: a metric of the stage's evaluations (eval_loss, eval_solved, eval_rewards/accuracies ...)."""
    goal: Literal["auto", "min", "max"] = "auto"
    """auto: min for a loss, max for anything else."""
    min_delta: float = Field(0.0, ge=0)
    """A value is better where it is by more than this."""
    patience: int | None = Field(None, ge=1)
    """Early stopping: after so many evaluations in a row without a better value; None: never."""

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than the best so far; any number is better than none (NaN)."""
        down = self.goal == "min" or (self.goal == "auto" and "loss" in self.metric)
        gain = than - value if down else value - than
        return gain > self.min_delta or (isnan(than) and not isnan(value))


class TrainingStage(StageBase):
    """A stage that trains, and may look at held-out data on its way."""

    makes: ClassVar[Made | None] = "model"
    eval_every: int = Field(50, ge=1)
    """Steps between evaluations on held-out rows (`eval_data`) or tasks (`evaluation`), where there are any."""
    best: BestConfig | None = None
    """The best model is kept beside the last one, as `@stage/best`; None: the last one alone."""

    def evaluation_budget(self) -> StageBudget | None:
        """What its evaluations on tasks cost: before the first step, after every so many, after the last."""
        evaluation: Evaluation | None = getattr(self, "evaluation", None)
        if evaluation is None:
            return None
        rows, steps = rows_of(evaluation.tasks), self.budget().steps
        return StageBudget(
            steps=None if steps is None else 1 - (-steps // self.eval_every),
            optimizer_steps=0,
            prompts=rows,
            sequences=times(rows, evaluation.samples),
            tokens_each=evaluation.sampling.max_tokens,
        )

    @property
    def measures(self) -> bool:
        """Whether there are held-out data."""
        return any(getattr(self, key, None) is not None for key in HELD_OUT)

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.best is not None and not self.measures:
            keys = " or ".join(key for key in HELD_OUT if key in type(self).model_fields)
            raise ValueError(f"best.metric is of held-out data, and there are none; add {keys}")
        return self


class Evaluation(Strict):
    """Held-out tasks that are answered every `eval_every` steps, before the first one and after the last."""

    tasks: Annotated[Source, BeforeValidator(path_of, json_schema_input_type=Source | str)]
    rewards: list[RewardConfig] = []
    """Empty: those of the stage."""
    samples: int = Field(1, ge=1)
    """Answers to each task."""
    sampling: SamplingConfig = SamplingConfig()
    """A stage that samples lends the keys that are not given (`{temperature: 0}`: its own, but greedy)."""


class RewardedEvaluation(Evaluation):
    """The same for a stage that has no rewards of its own."""

    rewards: list[RewardConfig] = Field(min_length=1)


ENGINE = ("engine", "server", "server_folder", "max_running", "cache_gib")


def _like_stage(evaluation: Evaluation | None, info: ValidationInfo) -> Evaluation | None:
    """The evaluation with the stage's rewards and sampling where it has none; both are validated before it."""
    if evaluation is None:
        return None
    asked, sampling = evaluation.sampling, evaluation.sampling
    if (own := info.data.get("sampling")) is not None:
        for key in ENGINE:
            if key in asked.model_fields_set and getattr(asked, key) != getattr(own, key):
                raise ValueError(f"sampling.{key}: the engine is the stage's own; leave it out")
        sampling = own.model_copy(update={key: getattr(asked, key) for key in asked.model_fields_set})
    rewards = evaluation.rewards or info.data.get("rewards", [])
    check_rewards(rewards, max_tokens=sampling.max_tokens, environment=info.data.get("environment") is not None)
    return evaluation.model_copy(update={"rewards": rewards, "sampling": sampling})


OwnEvaluation = Annotated[Evaluation | None, AfterValidator(_like_stage)]
"""Of a stage with `rewards` and `sampling`, which stand before it."""
OtherEvaluation = Annotated[RewardedEvaluation | None, AfterValidator(_like_stage)]
"""Of a stage without them."""
