"""The world on one machine: everything in this process, on the device and threads that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from whet.config import MachineConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.judge import ChatConfig, LocalChat
from whet.config.lag import LagConfig
from whet.config.rewards import ScorerConfig
from whet.envs.judges.cache import CachedChat
from whet.errors import ConfigError, ModelError
from whet.launch.clients import LazyScorer, build_chat
from whet.launch.memory import settle
from whet.launch.samplers import servers_ahead, start_fleet
from whet.models.armo import LENGTH, Gate, GateFacts
from whet.models.heads import RewardFacts, objectives_of, reward_facts, set_reward_facts
from whet.models.language import LanguageModel
from whet.models.load import load_model, load_scalar_model, read_eos_ids, read_max_length, read_vocabulary
from whet.models.tokenizer import load_tokenizer, new_tokens, require_same_tokens
from whet.pipeline.stage import NewGate, Policy
from whet.rollouts.chat import Speaker
from whet.sampling.base import PolicySampler
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.vllm import VllmSampler
from whet.sampling.vllm_server import VllmServerSampler
from whet.templates.jinja import JinjaTemplate
from whet.training.base import REFERENCE, TEACHER, Trainer
from whet.training.engine import LocalTrainer


def _vllm(model: LanguageModel, config: SamplingConfig) -> VllmSampler | VllmServerSampler:
    if model.routing is not None:
        raise ModelError(f"{model.name}: vLLM sends no tokens through two adapters; use sampling.engine: embedded")
    if config.server is None:
        return VllmSampler(model, max_running=config.max_running, cache_gib=config.cache_gib)
    return VllmServerSampler(model, config.servers, max_running=config.max_running, folder=config.server_folder)


SAMPLERS: Mapping[str, Callable[[LanguageModel, SamplingConfig], PolicySampler]] = {
    "embedded": lambda model, config: EmbeddedSampler(
        model, max_running=config.max_running, cache_gib=config.cache_gib
    ),
    "vllm": _vllm,
}
"""`sampling.engine`: what builds it."""


@dataclass(frozen=True, slots=True)
class LocalWorld:
    """`World` in this process. The embedded sampler reads the trainer's own tensors, so handing over costs nothing."""

    folder: Path | None = None
    """The run's folder: what judges answered is kept in it, and digests of files; None: in memory alone."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Samplers in processes of their own, and how long waits may take."""
    _scorers: WeakValueDictionary[tuple[str, bool], LazyScorer] = field(default_factory=WeakValueDictionary, init=False)
    """Reward models in use: training and its evaluation ask the same one."""

    def template(self, model: ModelConfig) -> JinjaTemplate:
        """The chat template of a model's tokenizer."""
        return _template(model)

    def max_length(self, model: ModelConfig) -> int:
        """Most tokens that the model attends to."""
        return read_max_length(model)

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
        """Trainer and sampler over the same weights; with LoRA its own reference is the adapter switched off."""
        if sampling.engine != "embedded" and (fresh := new_tokens(model)):
            raise ConfigError(
                f"model.add_tokens: {sampling.engine} reads {model.path} as it is, without {fresh[0]!r}; train them "
                "in a stage before (sft), or use sampling.engine: embedded"
            )
        other = reference if isinstance(reference, ModelConfig) and reference.path != model.path else None
        for reader, policy in ((model, reads), (other, model)):
            if reader is not None and policy is not None:
                require_same_tokens(reader, policy)
        tokens = settle(train, model, sampling, reference=other or bool(reference))
        template = self.template(model)
        language = load_model(model, **how_trained(train), with_score=with_value, stop_ids=template.stop_ids)
        language = replace(language, noise=train.neftune)
        kept = model if other is None and reference and train.lora is None else other
        frozen = {} if kept is None else {REFERENCE: load_model(kept)}
        frozen |= {} if teacher is None else {TEACHER: _teacher(teacher, model)}
        fleet = start_fleet(lambda: language, model, train, sampling, self.machine, lag, self.folder)
        start = cache(lambda: fleet or SAMPLERS[sampling.engine](language, sampling))
        return Policy(
            template=template,
            trainer=LocalTrainer(language, train, frozen, tokens=tokens),
            start_sampler=start,
            max_length=language.max_length,
            about=f"{language.precision} on {language.device.type}, micro-batches of {tokens:,} tokens",
            precision=language.precision,
            apart=fleet or servers_ahead(lag, start),
        )

    def teacher(self, model: ModelConfig, student: ModelConfig) -> Trainer:
        """A trainer over a frozen model; its output head is cut to what the student has."""
        return LocalTrainer(_teacher(model, student), TrainConfig())

    def scalar_model(
        self,
        model: ModelConfig,
        train: TrainConfig,
        *,
        reads: ModelConfig | None = None,
        objectives: Sequence[str] = (),
        gate: NewGate | None = None,
    ) -> Trainer:
        """A trainer over a model with a scalar head, which must know the tokens of the model that it `reads`."""
        if gate is not None:
            return _gated(gate, train)
        if reads is not None and model.path != reads.path:
            require_same_tokens(model, reads)
        language = load_scalar_model(model, **how_trained(train), objectives=objectives)
        if not objectives and (several := objectives_of(language.module)):
            raise ModelError(
                f"{model.path}: rates {', '.join(several)}, and one number is needed here; begin with a model of one"
            )
        return LocalTrainer(language, train)

    def chat(self, config: ChatConfig) -> CachedChat:
        """Who the recipe names; a model on this machine is loaded at its first question and never trained."""
        return build_chat(config, self._speaker, self.folder)

    def scorer(self, config: ScorerConfig, *, steps: bool) -> LazyScorer:
        """A reward model, loaded at its first question and never trained."""
        key = config.model_dump_json(), steps
        found = self._scorers.get(key) or LazyScorer(config=config, steps=steps, template=self.template)
        self._scorers[key] = found
        return found

    def _speaker(self, config: LocalChat) -> Speaker:
        loaded = LocalWorld.policy(self, config.alone(), TrainConfig(), SamplingConfig(max_running=config.max_running))
        return Speaker(
            template=loaded.template, sampler=loaded.sampler, trainer=loaded.trainer, max_length=loaded.max_length
        )

    def reseed(self, seed: int) -> None:
        """Seed torch's global generators, which dropout and new adapters draw from."""
        torch.manual_seed(seed)

    def close(self) -> None:
        """End the processes that it started: none."""


def _gated(new: NewGate, train: TrainConfig) -> LocalTrainer:
    """A frozen model with a new gate over its objectives; it begins with all of them alike."""
    config = new.config
    language = load_scalar_model(config.alone(), new_head=False)
    names = objectives_of(language.module)
    if not names or language.gate is not None:
        has = "has a gate already" if names else "has one score"
        raise ModelError(f"{config.path}: {has}, and a gate weighs several objectives (learn: ratings)")
    if config.debias not in (None, LENGTH, *names):
        raise ModelError(f"gate.debias is {config.debias!r}: neither length nor one of {', '.join(names)}")
    language.module.requires_grad_(False)
    facts = GateFacts(hidden=config.hidden, temperature=config.temperature, debias=config.debias)
    gate = Gate(facts, names, language.module.score.weight.shape[1]).to(language.device)
    set_reward_facts(language.module, replace(reward_facts(language.module) or RewardFacts(), gate=facts))
    trainer = LocalTrainer(replace(language, gate=gate), train)
    if config.debias is not None:
        read = trainer.forward(new.taught, "score")["score"]
        score_NK = torch.from_numpy(np.stack([end[0, 1 : 1 + len(names)] for end in read]))
        length_N = torch.tensor([float(len(row.tokens) - row.shared) for row in new.taught])
        gate.debias(score_NK.to(language.device), length_N.to(language.device))
    return trainer


def _teacher(model: ModelConfig, student: ModelConfig) -> LanguageModel:
    """Heads are padded to round sizes, which differ between the models of a family: no token stands there."""
    require_same_tokens(model, student)
    language, needed = load_model(model), read_vocabulary(student)
    if language.vocabulary < needed:
        raise ModelError(
            f"{model.path}: its head has {language.vocabulary:,} rows and that of {student.path} {needed:,}, so it "
            "cannot read all that a student may write; swap them, or write rows with it for SFT"
        )
    if language.vocabulary > needed:
        language.module.resize_token_embeddings(needed)
    return language


def how_trained(train: TrainConfig) -> dict[str, Any]:
    """What loading a model needs to know of its training."""
    return {
        "lora": train.lora,
        "checkpointing": train.gradient_checkpointing,
        "quantised": train.quantize is not None,
        "compiled": train.compile,
    }


@lru_cache(maxsize=4)
def _template(model: ModelConfig) -> JinjaTemplate:
    return JinjaTemplate(load_tokenizer(model), eos_ids=read_eos_ids(model))
