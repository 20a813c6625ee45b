"""The world whose trainers are spread over ranks; everything else is where it was, in the driver's process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file

from whet.config import MachineConfig, ModelConfig, Recipe, SamplingConfig, TrainConfig
from whet.config.lag import LagConfig
from whet.errors import ConfigError, MissingExtra, ModelError, RunError
from whet.files import digest_file
from whet.launch.ranks import Ranks, RankSetup, told_by_launcher
from whet.launch.samplers import servers_ahead, start_fleet
from whet.launch.world import SAMPLERS, LocalWorld, how_trained
from whet.models.device import pick_device
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.models.matmul import library
from whet.pipeline.stage import Policy
from whet.sampling.base import PolicySampler
from whet.training.base import Trainer
from whet.training.group import GroupFailure, GroupTrainer, RankGroup


@dataclass(slots=True)
class Noted:
    """What outlives a group that failed."""

    seed: int = 0
    built: int = 0
    most_tokens: int | None = None
    """Where memory ran out: the largest micro-batch from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedWorld(LocalWorld):
    """`World` with its trainers on the ranks of a group, which is started when a stage first needs it."""

    group: RankGroup
    _noted: Noted = field(default_factory=Noted, init=False)
    _alive: WeakValueDictionary[str, GroupTrainer] = field(default_factory=WeakValueDictionary, init=False)
    """Trainers in use: the ranks drop all others when they build one."""

    def policy(
        self,
        model: ModelConfig,
        train: TrainConfig,
        sampling: SamplingConfig,
        *,
        with_value: bool = False,
        lag: LagConfig | None = None,
        **others: Any,
    ) -> Policy:
        """A trainer on the ranks; a sampler here or in other processes, by a copy of the weights that is renewed."""
        keys = {"with_value": with_value, **others}
        trainer, (max_length, about, precision) = self._build(LocalWorld.policy, (model, train, sampling), keys)
        template = self.template(model)

        @cache
        def copied() -> LanguageModel:
            return load_model(model, **how_trained(train), with_score=with_value, stop_ids=template.stop_ids)

        def renew() -> None:
            self._renew(trainer, copied())

        fleet = start_fleet(copied, model, train, sampling, self.machine, lag, self.folder)

        @cache
        def start() -> PolicySampler:
            if fleet is not None:
                return fleet
            renew()
            return SAMPLERS[sampling.engine](copied(), sampling)

        return Policy(
            template=template,
            trainer=trainer,
            start_sampler=start,
            max_length=max_length,
            about=f"{about} on each of {self.group.ranks} ranks",
            precision=precision,
            renew=renew,
            apart=fleet or servers_ahead(lag, start),
        )

    def teacher(self, model: ModelConfig, student: ModelConfig) -> Trainer:
        """A frozen model, spread like one that is trained."""
        return self._build(LocalWorld.teacher, (model, student), {})[0]

    def scalar_model(self, model: ModelConfig, train: TrainConfig, **keys: Any) -> Trainer:
        """A critic or a reward model on the ranks."""
        return self._build(LocalWorld.scalar_model, (model, train), keys)[0]

    def reseed(self, seed: int) -> None:
        """The same state on the ranks: new adapters are the same everywhere, and dropout goes on from there."""
        LocalWorld.reseed(self, seed)
        self._noted.seed = seed
        if self._alive:
            self.group.call("reseed", [(seed,)] * self.group.ranks, self.machine.deadlines.progress_s)

    def failed(self, failure: GroupFailure) -> None:
        """Take note of why the ranks are gone, before the run goes on with new ones."""
        if failure.most_tokens is not None:
            self._noted.most_tokens = min(failure.most_tokens, self._noted.most_tokens or failure.most_tokens)
        self._alive.clear()

    def close(self) -> None:
        """End the ranks."""
        self.group.stop()

    def _build(
        self, method: Callable[..., Any], arguments: Sequence[Any], keys: dict[str, Any]
    ) -> tuple[GroupTrainer, Any]:
        """A trainer that every rank builds as `LocalWorld` would, and what the first one tells of it."""
        deadlines, noted = self.machine.deadlines, self._noted
        self.group.start(deadlines.start_s)
        if not self._alive:  # new processes, or nothing that they hold is in use
            self.group.call("reseed", [(noted.seed,)] * self.group.ranks, deadlines.progress_s)
        noted.built += 1
        name = f"{method.__name__} {noted.built}"
        how = self.machine.trainer
        part = (name, list(self._alive), how.replicate, how.context, noted.most_tokens, method, arguments, keys)
        facts = self.group.call("build", [part] * self.group.ranks, deadlines.start_s)[0]
        trainer = self._alive[name] = GroupTrainer(
            self.group, name, deadline_s=deadlines.progress_s, context=how.context
        )
        return trainer, facts

    def _renew(self, trainer: GroupTrainer, language: LanguageModel) -> None:
        """The ranks' weights into a model here, through a file whose digest the first rank tells."""
        here = self.machine.launch == "local" and told_by_launcher() is None
        near = None if here else self.folder  # a folder that all machines see
        with TemporaryDirectory(prefix="whet-weights-", dir=near) as folder:
            file = Path(folder) / "weights.safetensors"
            told = trainer.gather(file)
            if (found := digest_file(file).sha256) != told:
                raise RunError(f"{file}: the weights of the ranks came as {found[:12]} and were sent as {told[:12]}")
            weights = load_file(file)
        with torch.no_grad():
            for name, p in language.parameters.items():
                p.copy_(weights[name])


def build_world(recipe: Recipe, *, threads: int, frugal: bool) -> LocalWorld:
    """The world of a recipe's machine: all in this process, or its trainers on ranks, which share its threads."""
    trainer = recipe.machine.trainer
    if in_process(recipe.machine):
        return LocalWorld(folder=recipe.folder, machine=recipe.machine)
    require_ranks(recipe)
    setup = RankSetup(
        world=trainer.ranks,
        store=("", 0),
        device=recipe.model.device,
        threads=max(1, threads // trainer.gpus),
        products=library(),
        frugal=frugal,
        collective_s=recipe.machine.deadlines.collective_s,
    )
    started_by = _ray_ranks() if recipe.machine.launch == "ray" else Ranks
    return RankedWorld(folder=recipe.folder, group=started_by(recipe.machine, setup), machine=recipe.machine)


def in_process(machine: MachineConfig) -> bool:
    """Whether the trainer is in the driver's process."""
    return machine.trainer.ranks == 1 and machine.launch == "local"


def _ray_ranks() -> type[Ranks]:
    try:
        from whet.launch.ray import RayRanks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise MissingExtra("machine.launch: ray needs Ray; pip install 'whet[ray]'") from error
    return RayRanks


UNSHARDED = {
    "quantize": "four-bit weights cannot be spread over ranks",
    "compile": "compiled layers were not tried with several ranks",
    "offload": "what is spread over ranks is not moved to the host",
}
"""Keys of `train` that go with one process alone."""


def require_ranks(recipe: Recipe) -> None:
    """Raise `ConfigError` or `ModelError` where a recipe cannot be trained on so many ranks."""
    trainer = recipe.machine.trainer
    if in_process(recipe.machine):
        return
    here = recipe.machine.launch == "local" and told_by_launcher() is None
    if here and trainer.nodes > 1:
        raise ConfigError(
            f"machine.trainer.nodes is {trainer.nodes}, and the driver starts ranks on its own machine alone; let a "
            "launcher start them, with WHET_DRIVER and WHET_KEY for it and for this command (docs/scale.md), or set 1"
        )
    for name, stage in recipe.distinct.items():
        train = getattr(stage, "train", None)
        told = {key: why for key, why in UNSHARDED.items() if getattr(train, key, None)}
        if getattr(train, "optimizer", "") == "adamw8bit":
            told["optimizer"] = "bitsandbytes' state cannot be spread over ranks; use adamw"
        for key, why in told.items():
            raise ConfigError(f"stages.{name}.train.{key}: {why}; leave it out, or set machine.trainer.gpus=1")
    there = torch.cuda.device_count() if here and pick_device(recipe.model.device).type == "cuda" else trainer.gpus
    if trainer.gpus > there:
        raise ModelError(f"machine.trainer.gpus is {trainer.gpus}, and this machine has {there}; set at most that")
