"""What a kind of stage is, and what it may ask of the machine.

A kind is one record: the section of a recipe that it reads, how it runs, what it checks ahead, what it needs in memory,
and how the report shows it. Whatever lists kinds of stages derives from the records in `pipeline.kinds`.

A stage takes its part of the recipe, the models that earlier stages made and a folder, and leaves an artifact
there. It is done when the folder's manifest exists, which is written last. Where things run is the `World`'s
business, which `launch` builds and hands in: a pipeline never knows whether it is on a laptop or on a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from whet.config import MachineConfig, ModelConfig, SamplingConfig, SaveConfig, TrainConfig
from whet.config.lag import LagConfig
from whet.config.model import ReferenceModel
from whet.config.policy_terms import CriticConfig
from whet.config.reward_model import GateConfig
from whet.config.stage import StageBase
from whet.data.faults import Dropped
from whet.envs.base import Task
from whet.envs.clients import Models
from whet.files import write_atomic
from whet.records import TokenRow
from whet.sampling.base import ApartSampler, PolicySampler
from whet.templates.base import Template
from whet.tracking.base import Sink
from whet.tracking.charts import PLAIN, Look
from whet.tracking.console import Console
from whet.training.base import Trainer

ROWS = "rows.jsonl"
"""The rows that a stage made, in its folder."""
LEARNED = "learned.json"
"""Among a stage's checkpoints, once one has weights that were changed."""


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
    precision: str
    """What the forward pass computes in: float32 or bfloat16."""
    renew: Callable[[], None] | None = None
    """Brings the trainer's weights to the model that the sampler reads, where that is a copy."""
    apart: ApartSampler | None = None
    """The sampler, where it has processes of its own: `close` ends them."""

    @property
    def sampler(self) -> PolicySampler:
        """The sampler; a stage that never asks for it has none."""
        return self.start_sampler()

    @property
    def hand_over(self) -> Callable[[int], None]:
        """Brings the current weights to the sampler under the version that it is given."""
        sampler, renew = self.sampler, self.renew
        if renew is None:
            return sampler.publish

        def renewed(version: int) -> None:
            renew()
            sampler.publish(version)

        return renewed

    def close(self) -> None:
        """End what was started for it."""
        if self.apart is not None:
            self.apart.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGate:
    """A gate to train over a frozen model's objectives, debiased over the rows that it is taught."""

    config: GateConfig
    taught: Sequence[TokenRow]


class World(Models, Protocol):
    """Builds what a stage needs, wherever it is to live."""

    @property
    def machine(self) -> MachineConfig:
        """Where that is, and how long waits may take."""

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
        reference: ModelConfig | bool = False,
        reads: ModelConfig | None = None,
        teacher: ModelConfig | None = None,
        with_value: bool = False,
        lag: LagConfig | None = None,
    ) -> Policy:
        """Load a model to train and to sample.

        `reference`: a frozen model at hand, or (True) its own starting weights. `teacher`: another. `reads`: the policy
        whose tokens it is given. `with_value` gives it a critic's head as well. With a `lag` it may be sampled apart,
        where the machine has samplers. Raises `ModelError` where tokenizers differ.
        """

    def teacher(self, model: ModelConfig, student: ModelConfig) -> Trainer:
        """A model that reads the student's tokens and is never trained. Raises `ModelError` where it cannot."""

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

    def reseed(self, seed: int) -> None:
        """Set whatever random state is left (dropout, new adapters) for what comes next."""


Config = TypeVar("Config", bound=StageBase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Generic[Config]):
    """Everything that a stage is given."""

    name: str
    config: Config
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
    """The console, the live report and the recipe's trackers."""
    stopped: Callable[[], bool]
    """Whether a stop was requested; looked at between steps and between batches of an evaluation."""


class Interrupted(Exception):
    """The stage stopped because it was asked to; everything up to its last step is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a stage found when it looked at its rows or tasks, before anything is loaded."""

    summary: str
    rows: Sequence[TokenRow] = ()
    """A few, to be shown with their loss mask."""
    prompts: Sequence[Task] = ()
    """A few, to be shown as the model reads them."""
    tools: tuple[dict[str, Any], ...] = ()
    """What may be called in answer to the prompts."""
    prompt_tokens: int | None = None
    """Of the longest prompt that is answered; None: there is none, or an environment goes on from it."""
    step_tokens: int | None = None
    """Most tokens of an optimizer step; None: known when it is there."""
    uncut_tokens: int | None = None
    """Most tokens of what no micro-batch cuts: a row, or rows that are compared; None: as many as the keys allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stage makes of its model; the models that its rewards and chats ask are in its keys."""

    train: TrainConfig | None = None
    """None: it is not trained."""
    sampling: SamplingConfig | None = None
    """None: it is not sampled."""
    reference: ReferenceModel | bool = False
    """Whether its starting weights stay at hand, or another model's beside it."""
    critic: CriticConfig | None = None
    scalar: bool = False
    """Whether it gives numbers, not tokens."""


def reference_of(model: ModelConfig, other: ReferenceModel | None) -> ModelConfig:
    """What a stage that starts from a model compares with: another one, loaded as it is, or that model itself."""
    return model if other is None else model.at(other.path)


def training_and_sampling(config: Any) -> Needs:
    """What the `train` and `sampling` sections of a stage ask for."""
    sampling = getattr(config, "sampling", None) or getattr(getattr(config, "evaluation", None), "sampling", None)
    return Needs(train=getattr(config, "train", None), sampling=sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of stage."""

    config: type[StageBase]
    """Its section of a recipe, with what it costs (`budget`) and what does not fit together (`unfit`)."""
    run: Callable[[Context[Any]], object]
    """Leaves the artifact in `Context.folder`; raises `Interrupted`, with its progress saved, when asked to stop."""
    check: Callable[[Context[Any]], Seen]
    """Finds everything that can be wrong with the data, before a model is loaded and without writing anything."""
    needs: Callable[[Any], Needs | None] = training_and_sampling
    """(section): what it makes of its model, for the plan of its memory; None: it loads none of its own."""
    look: Look = PLAIN
    """Its charts, and the numbers that sum it up."""


def keep_dropped(context: Context, key: str, dropped: Sequence[Dropped]) -> None:
    """Write the rows of a source that were left out; no file where there are none."""
    path = context.folder / "dropped" / f"{key}.jsonl"
    lines = [
        json.dumps({"row": str(lost.row), "reason": lost.reason, "fault": lost.fault}, ensure_ascii=False) + "\n"
        for each in dropped
        for lost in each.rows
    ]
    if lines:
        write_atomic(path, "".join(lines).encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)
