"""What a stage is, and what it may ask of the machine.

A stage takes its part of the recipe, the models that earlier stages made and a folder, and leaves an artifact
there. It is done when the folder's manifest exists, which is written last. Where things run is the `World`'s
business, which `launch` builds and hands in: a pipeline never knows whether it is on a laptop or on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from whet.config import ModelConfig, SamplingConfig, SaveConfig, Stage, TrainConfig
from whet.config.judge import ChatConfig
from whet.config.reward_model import GateConfig
from whet.config.rewards import ScorerConfig
from whet.envs.asked import Chat, Scorer
from whet.records import TokenRow
from whet.sampling.base import PolicySampler
from whet.templates.base import Template
from whet.tracking.base import Sink
from whet.tracking.console import Console
from whet.training.base import Trainer

ROWS = "rows.jsonl"
"""The rows that a stage made, in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A model at work: its template, a trainer, and a sampler for stages that sample."""

    template: Template
    trainer: Trainer
    start_sampler: Callable[[], PolicySampler]
    """Starts the sampler at the first call, and returns the same one ever after."""
    max_length: int
    """Most tokens that the model attends to."""
    about: str
    """How it computes: what was chosen for this machine, for people to read."""

    @property
    def sampler(self) -> PolicySampler:
        """The sampler; a stage that never asks for it has none."""
        return self.start_sampler()

    def hand_over(self, version: int) -> None:
        """Bring the current weights to the sampler under this version."""
        self.sampler.publish(version)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGate:
    """A gate to train over a frozen model's objectives, debiased over the rows that it is taught."""

    config: GateConfig
    taught: Sequence[TokenRow]


class World(Protocol):
    """Builds what a stage needs, wherever it is to live."""

    def template(self, model: ModelConfig) -> Template:
        """The model's template alone: the data gate runs before any weights are loaded."""

    def max_length(self, model: ModelConfig) -> int:
        """Most tokens that the model attends to, from its configuration alone."""

    def policy(
        self,
        model: ModelConfig,
        train: TrainConfig,
        sampling: SamplingConfig,
        *,
        reference: bool = False,
        with_value: bool = False,
    ) -> Policy:
        """Load a model to train and to sample.

        With `reference` its starting weights stay at hand, frozen; `with_value` gives it a critic's head as well.
        """

    def scalar_model(
        self,
        model: ModelConfig,
        train: TrainConfig,
        *,
        reads: ModelConfig | None = None,
        objectives: Sequence[str] = (),
        gate: NewGate | None = None,
    ) -> Trainer:
        """A model that gives numbers (a critic, a reward model) with a trainer of its own, from any model's weights.

        It gives one, or one for each of the `objectives`. `reads`: the policy whose tokens it is given. With a `gate`
        the model stays as it is, and the gate over its objectives is trained. Raises `ModelError` where its tokenizer
        is another one, or the weights have a head of other outputs.
        """

    def chat(self, config: ChatConfig) -> Chat:
        """Somebody who answers conversations: an endpoint, a local model or a script. Asks nobody until it is asked."""

    def scorer(self, config: ScorerConfig, *, steps: bool) -> Scorer:
        """A reward model, of answers or of `steps`; nothing is loaded until it is asked."""

    def reseed(self, seed: int) -> None:
        """Set whatever random state is left (dropout, new adapters) for what comes next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a stage is given."""

    name: str
    config: Stage
    model: ModelConfig
    """The model that the stage starts from, references resolved."""
    models: Mapping[str, ModelConfig]
    """For an evaluation: what to evaluate, by label."""
    folder: Path
    """Where the artifact grows."""
    checkpoints: Path
    """Where its checkpoints live until the artifact is complete."""
    seed: int
    save: SaveConfig
    world: World
    console: Console
    sinks: Sequence[Sink]
    """Who hears of every step: the console, and the recipe's trackers."""
    stopped: Callable[[], bool]
    """Whether somebody asked to stop; looked at between steps and between batches of an evaluation."""


class Interrupted(Exception):
    """The stage stopped because it was asked to; everything up to its last step is saved."""
