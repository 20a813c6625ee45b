"""Reward models for rewards: loaded at the first question, on this machine, never trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        objectives, weights = objectives_of(language.module), self.config.objectives
        weighed = bool(objectives) and facts.gate is None
        if weighed and not weights:
            raise ModelError(
                f"{model.path}: has several objectives and no gate; say in objectives what each of them counts for "
                f"({', '.join(objectives)})"
            )
        if weights and not weighed:
            has = "a gate that weighs its objectives" if objectives else "one score"
            raise ModelError(f"{model.path}: has {has}; leave objectives out")
        if unknown := [name for name in weights if name not in objectives]:
            raise ModelError(f"{model.path}: has no objective {unknown[0]!r}; it has {', '.join(objectives)}")
        return ModelScorer(
            trainer=LocalTrainer(language, TrainConfig()),
            template=self.template(model),
            max_length=language.max_length,
            facts=facts,
            objectives=objectives,
            weights=weights,
        )
