"""The stage of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, rows_of, times
from whet.config.data import Source
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import RewardConfig, check_rewards, verified
from whet.config.stage import StageBase
from whet.config.strict import Strict
from whet.config.train import SamplingConfig


class ThinkingBudgets(Strict):
    """Accuracy against tokens of thinking (budget forcing, s1, 2501.19393): each model thinks under every budget."""

    tokens: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """Most tokens of thinking; `sampling.max_tokens` are then those of the answer behind it."""
    end: str = Field("</think>", min_length=1)
    """What ends thinking. Where it has not come by then, thinking is cut."""
    cut: str | None = None
    """What is written where thinking is cut; None: a new line, `end` and an empty line."""
    extend: int = Field(0, ge=0)
    """How often a model that ends thinking under its budget is made to go on."""
    wait: str = Field("Wait", min_length=1)
    """What is written in the place of `end` then."""


class InterferenceConfig(Strict):
    """Labels of the four models whose interaction is measured (CEA, 2602.00994)."""

    base: str
    """What the others were trained from."""
    tool: str
    """Trained on calls alone (`train.roles: [call]`)."""
    reasoning: str
    """Trained on everything else."""
    both: str


class EvalStage(StageBase):
    """Sampled accuracy of several models on the same held-out tasks, with paired intervals."""

    free: ClassVar[frozenset[str]] = frozenset({"guard"})

    kind: Literal["eval"]
    models: dict[str, str] = {}
    """Label: a model path, `@stage` or `@model` (what the recipe starts from). Empty: the model of the stage before."""
    baseline: str | None = None
    """Label of the model that the others' gains are over; None: the first one."""
    guard: float | None = Field(None, ge=0, lt=1)
    """The run stops where the last of the models is surely worse than the baseline by more than that: where the whole
    interval of its gain lies below -guard."""
    tasks: Source
    environment: EnvironmentConfig | None = None
    """The environment of the tasks; None: each is one question and one answer. A text is short for its `path`."""
    rewards: list[RewardConfig] = Field(default_factory=verified, min_length=1)
    samples: int = Field(4, ge=1)
    """Completions of each task."""
    sampling: SamplingConfig = SamplingConfig()
    budgets: ThinkingBudgets | None = None
    """Budgets of thinking under which every model answers; None: an answer ends where it ends."""
    interference: InterferenceConfig | None = None
    """Measure whether training on calls and on the rest add up in four of the models; None: it is not asked."""

    @model_validator(mode="after")
    def _check(self) -> EvalStage:
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens, environment=self.environment is not None)
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline!r}, which is none of the labels in models")
        of_four = [] if self.interference is None else list(self.interference.model_dump().items())
        if strange := next((pair for pair in of_four if pair[1] not in self.models), None):
            raise ValueError(f"interference.{strange[0]} is {strange[1]!r}, which is none of the labels in models")
        if of_four and self.budgets is not None:
            raise ValueError("interference compares models, not budgets; leave budgets out")
        if self.guard is not None and len(self.models) < 2:
            raise ValueError("guard compares the last of models with the baseline; name at least two in models")
        return self

    @property
    def evaluates(self) -> Mapping[str, str]:
        """Its `models`."""
        return self.models

    def budget(self) -> StageBudget:
        """One step, of all samples of all models."""
        rows, budgets = rows_of(self.tasks), [0] if self.budgets is None else self.budgets.tokens
        return StageBudget(
            steps=1,
            optimizer_steps=0,
            prompts=rows,
            sequences=times(rows, self.samples, max(1, len(self.models)), len(budgets)),
            tokens_each=self.sampling.max_tokens + max(budgets),
        )
