"""The stage of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from whet.config.budget import StageBudget, rows_of, times
from whet.config.data import Source
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import RewardConfig, check_rewards, verified
from whet.config.stage import StageBase
from whet.config.train import SamplingConfig


class EvalStage(StageBase):
    """Sampled accuracy of several models on the same held-out tasks, with paired intervals."""

    kind: Literal["eval"]
    models: dict[str, str] = {}
    """Label: a model path, `@stage` or `@model` (what the recipe starts from). Empty: the model of the stage before."""
    baseline: str | None = None
    """Label of the model that the others' gains are over; None: the first one."""
    tasks: Source
    environment: EnvironmentConfig | None = None
    """Tools, and who answers; None: every task is one question and one answer. A text is short for its `path`."""
    rewards: list[RewardConfig] = Field(default_factory=verified, min_length=1)
    samples: int = Field(4, ge=1)
    """Completions of each task."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> EvalStage:
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens, environment=self.environment is not None)
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline!r}, which is none of the labels in models")
        return self

    @property
    def evaluates(self) -> Mapping[str, str]:
        """Its `models`."""
        return self.models

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
