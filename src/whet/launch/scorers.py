"""Reward models for rewards: loaded at the first question, on this machine, never trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from whet.algorithms.scorer import ModelScorer
from whet.config import ModelConfig, TrainConfig
from whet.config.reward_model import misweighed
from whet.config.rewards import ScorerConfig
from whet.envs.clients import Passage, ScoreReading
from whet.errors import ModelError
from whet.models.heads import RewardFacts, objectives_of, reward_facts
from whet.models.load import load_scalar_model
from whet.templates.base import Template
from whet.training.engine import LocalTrainer


@dataclass(kw_only=True)
class LazyScorer:
    """`Scorer` that comes to life when it is first asked; `whet check` and `whet plan` load none."""

    config: ScorerConfig
    steps: bool
    template: Callable[[ModelConfig], Template]
    _loaded: ModelScorer | None = field(default=None, init=False)

    def read(self, passages: Sequence[Passage]) -> list[ScoreReading]:
        """One reading of each passage. Raises `ModelError` where the model cannot be loaded or is of another kind."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded.read(passages)

    def _load(self) -> ModelScorer:
        model = self.config.alone()
        language = load_scalar_model(model, new_head=False)
        facts = reward_facts(language.module)
        if facts is None:  # of another origin: the recipe's author knows what it was trained for
            facts = RewardFacts(reads="steps", link="sigmoid") if self.steps else RewardFacts()
        if (facts.reads == "steps") != self.steps:
            kind = "model" if self.steps else "process_model"
            raise ModelError(f"{model.path}: is a reward model of {facts.reads}; use kind: {kind} for it")
        objectives = objectives_of(language.module)
        if self.steps and objectives:
            raise ModelError(f"{model.path}: has several outputs, and a process reward model has one")
        if problem := misweighed(objectives, self.config.objectives, gated=facts.gate is not None):
            raise ModelError(f"{model.path}: {problem}")
        return ModelScorer(
            trainer=LocalTrainer(language, TrainConfig()),
            template=self.template(model),
            max_length=language.max_length,
            facts=facts,
            objectives=objectives,
            weights=self.config.objectives,
        )
