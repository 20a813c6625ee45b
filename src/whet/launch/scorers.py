"""Reward models for rewards: loaded at the first question, on this machine, never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from whet.algorithms.scorer import ModelScorer
from whet.config import ModelConfig, TrainConfig
from whet.config.rewards import ScorerConfig
from whet.envs.base import Passage, Reading
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

    def read(self, passages: Sequence[Passage]) -> list[Reading]:
        """One reading of each passage. Raises `ModelError` where the model cannot be loaded or is of another kind."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded.read(passages)

    def _load(self) -> ModelScorer:
        model = self.config.alone()
        language = load_scalar_model(model, new_head=False)
        facts = reward_facts(language.module)
        if facts is None:  # somebody else's: what it was trained for is known to whoever names it
            facts = RewardFacts(reads="steps", link="sigmoid") if self.steps else RewardFacts()
        if (facts.reads == "steps") != self.steps:
            kind = "model" if self.steps else "process_model"
            raise ModelError(f"{model.path}: is a reward model of {facts.reads}; use kind: {kind} for it")
        objectives = objectives_of(language.module)
        for problem in self._problems(objectives, gated=facts.gate is not None):
            raise ModelError(f"{model.path}: {problem}")
        return ModelScorer(
            trainer=LocalTrainer(language, TrainConfig()),
            template=self.template(model),
            max_length=language.max_length,
            facts=facts,
            objectives=objectives,
            weights=self.config.objectives,
        )

    def _problems(self, objectives: Sequence[str], *, gated: bool) -> Iterator[str]:
        """What is wrong with the weights that the recipe has, or has not, for these objectives of the model."""
        weights, named = self.config.objectives, ", ".join(objectives)
        if self.steps and objectives:
            yield "has several outputs, and a process reward model has one"
        if objectives and not gated and not weights:
            yield f"has several objectives and no gate; say in objectives what counts how much: {named}"
        if weights and (gated or not objectives):
            has = "a gate that weighs its objectives" if gated else "one score"
            yield f"has {has}; leave objectives out"
        if unknown := [name for name in weights if name not in objectives]:
            yield f"has no objective {unknown[0]!r}; it has {named}"
