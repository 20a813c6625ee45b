"""The models that a recipe's judges, writers and rewards ask: chat clients, and reward models of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from whet.algorithms.scorer import ModelScorer
from whet.config import ModelConfig, TrainConfig
from whet.config.judge import ChatConfig, EndpointChat, LocalChat
from whet.config.reward_model import misweighed
from whet.config.rewards import ScorerConfig
from whet.envs.clients import Passage, ScoreReading
from whet.envs.judges.cache import Asker, CachedChat, no_probabilities
from whet.envs.judges.scripted import ScriptedAsker
from whet.errors import ModelError
from whet.files import Digests
from whet.models.heads import RewardFacts, objectives_of, reward_facts
from whet.models.load import load_scalar_model
from whet.pipeline.identity import name_of, section_identity
from whet.pipeline.lineage import DIGESTS
from whet.records import Message, Reply
from whet.rollouts.chat import ModelAsker, Speaker
from whet.sampling.base import SamplingParams
from whet.sampling.endpoint import EndpointSampler
from whet.templates.base import Template
from whet.training.engine import LocalTrainer

Load = Callable[[LocalChat], Speaker]


class EndpointAsker:
    """`Asker` over an endpoint."""

    alone = True

    def __init__(self, config: EndpointChat) -> None:
        self.identity = f"endpoint {config.base_url} {config.model} at {config.temperature}"
        self._temperature = config.temperature
        self._sampler = EndpointSampler(
            config.base_url,
            config.model,
            api_key_env=config.api_key_env,
            concurrency=config.concurrency,
            requests_per_minute=config.requests_per_minute,
            attempts=config.attempts,
            request_s=config.request_s,
            total_s=config.deadline_s,
            budget_key=config.budget_key,
        )

    def ask(
        self, conversations: Sequence[Sequence[Message]], keys: Sequence[str], *, max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """What the endpoint answers, as it comes."""
        params = SamplingParams(max_tokens=max_tokens, temperature=self._temperature)
        with closing(self._sampler.replies(conversations, params)) as replies:
            yield from replies

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """Endpoints tell too few of them to be of use."""
        raise no_probabilities(self.identity)

    def close(self) -> None:
        """Nothing is open between calls."""


def build_chat(config: ChatConfig, load: Load, folder: Path | None) -> CachedChat:
    """Who the recipe names, with answers kept in its own `cache` or in the run's; in memory where there is neither."""
    with Digests(None if folder is None else folder / DIGESTS) as digests:
        asker = _asker(config, load, digests)
    return CachedChat(asker, config.cache or (None if folder is None else folder / "answers" / "answers.jsonl"))


def _asker(config: ChatConfig, load: Load, digests: Digests) -> Asker:
    if isinstance(config, EndpointChat):
        return EndpointAsker(config)
    if isinstance(config, LocalChat):
        return ModelAsker(lambda: load(config), identity=speaker_of(config, digests), temperature=config.temperature)
    return ScriptedAsker(config.script, deadline_s=config.deadline_s)


def speaker_of(config: LocalChat, digests: Digests) -> str:
    """A name that changes with whatever changes a model's words: weights, shape, precision and chat template."""
    return name_of(section_identity(config.alone(), "model", digests))


@dataclass(kw_only=True)
class LazyScorer:
    """`RewardModelClient` that loads its model at the first call; `whet check` and `whet plan` load none."""

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
