"""The stage of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, rows_of, times
from whet.config.data import Source
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import RewardConfig, check_rewards
from whet.config.stage import StageBase
from whet.config.train import SamplingConfig


class ModelsStage(StageBase):
    """A stage that evaluates several models on the same held-out data."""

    models: dict[str, str] = {}
    """Label: a model path, `@stage` or `@model` (what the recipe starts from). Empty: the model of the stage before."""
    baseline: str | None = None
    """Label of the model that the others are compared with; None: the first one."""

    @model_validator(mode="after")
    def _check_baseline(self) -> Self:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline!r}, which is none of the labels in models")
        return self

    @property
    def evaluates(self) -> Mapping[str, str]:
        """Its `models`."""
        return self.models


class PerplexityStage(ModelsStage):
    """Held-out loss and perplexity of several models on the same rows, with paired intervals; nothing is trained."""

    kind: Literal["perplexity"]
    data: Source
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """As in `train`: which tokens count."""
    max_length: int | None = Field(None, ge=2)
    """Longest row in tokens; None: the model's own limit."""

    def budget(self) -> StageBudget:
        """One step, of all rows for each model."""
        rows = rows_of(self.data)
        sequences = times(rows, max(1, len(self.models)))
        return StageBudget(steps=1, optimizer_steps=0, prompts=rows, sequences=sequences, tokens_each=self.max_length)


class EvalStage(ModelsStage):
    """Sampled accuracy of several models on the same held-out tasks, with paired intervals."""

    kind: Literal["eval"]
    tasks: Source
    rewards: list[RewardConfig] = Field(min_length=1)
    environment: EnvironmentConfig | None = None
    """Plays of several turns; None: one answer to each task. `environment: FILE.py:CLASS` is short for its `path`."""
    samples: int = Field(4, ge=1)
    """Completions of each task."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens)
        return self

    def budget(self) -> StageBudget:
        """One step, of all samples of all models."""
        rows = rows_of(self.tasks)
        return StageBudget(
            steps=1,
            optimizer_steps=0,
            prompts=rows,
            sequences=times(rows, self.samples, max(1, len(self.models))),
            tokens_each=self.sampling.max_tokens,
        )
