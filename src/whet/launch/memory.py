"""Will it fit? The peak memory of each stage, before anything is loaded.

A training step is rehearsed on tensors without content (`models.footprint`) with a full micro-batch; the key-value
cache of the sampler is arithmetic. On a CPU the process itself and the allocator's fragments are added, as measured.
There is a row for each model of a stage (policy, reference, critic, ...), and it says what sharing saves. The same
arithmetic chooses the micro-batches of a GPU.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.algorithms.sft import CrossEntropy, weigh
from whet.config import ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from whet.config.judge import JudgeConfig, LocalChat
from whet.config.policy_terms import CriticConfig
from whet.config.rewards import scorers
from whet.config.stage import StageBase
from whet.config.strict import children
from whet.errors import ModelError
from whet.launch.memory_report import Footprint, Role, fitting_tokens, on_each_rank, with_samplers
from whet.models.architecture import layers_of
from whet.models.device import pick_device
from whet.models.footprint import Ledger, rehearsal
from whet.models.heads import is_scalar
from whet.models.language import LanguageModel, Packed, pack
from whet.models.load import read_max_length
from whet.models.quantize import NF4_BYTES, quantisable
from whet.pipeline.run import Run
from whet.pipeline.stage import Seen
from whet.records import TokenRow
from whet.sampling.engine import PREFIX_SHARE
from whet.training.base import Batch, Outputs
from whet.training.engine import CACHED_TOKENS, as_batch
from whet.training.optim import Optimizers, eight_bit_state

FRAGMENTS = 1.14
"""What the C allocator holds beyond what is alive, on a CPU (docs/memory.md), unless a stage is `frugal`."""
PROMPT_TOKENS = 512
"""Length of a prompt that a plan reckons with, where the data are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A model on this machine that judges or writes."""

    role: str
    model: ModelConfig
    sampling: SamplingConfig | None


def footprints(run: Run, look: Callable[[str], Seen | None] = lambda _: None) -> list[Footprint]:
    """The footprint of every stage of a run that loads a model, in order; `look` finds what its rows and tasks are."""
    require_offload(run)
    found = (
        _footprint(run, name, stage, look(name) or Seen(summary="")) for name, stage in run.recipe.distinct.items()
    )
    return [each for each in found if each is not None]


def require_offload(run: Run) -> None:
    """Raise `ModelError` where a stage would offload and computes on the CPU, which is the host already."""
    for name, train in trainings(run).items():
        if train.offload and pick_device(run.model_of(name).device).type == "cpu":
            raise ModelError(
                f"stages.{name}.train.offload: moves memory from a GPU to the host, and this stage computes on the "
                "CPU; leave it out"
            )


def trainings(run: Run) -> dict[str, TrainConfig]:
    """How each stage trains, by its name; stages that train nothing are left out."""
    return {name: stage.train for name, stage in run.recipe.distinct.items() if hasattr(stage, "train")}


def frugal(train: TrainConfig) -> bool:
    """Whether the user traded speed for memory; on a CPU the allocator then gives back what is free."""
    return train.gradient_checkpointing or train.lora is not None


def _footprint(run: Run, name: str, stage: StageBase, seen: Seen) -> Footprint | None:
    """Of one stage; what an earlier stage will make has the shapes of what it started from."""
    needs, asked = run.kind(name).needs(stage), [replace(a, model=run.origin(a.model)) for a in _asked_in(stage)]
    if needs is None and not asked:
        return None
    if needs is None:  # nothing but a model that is asked
        return footprint(name, asked[0].model, None, asked[0].sampling)
    model, rewards = run.origin(run.model_of(name)), getattr(stage, "rewards", [])
    others = [r for r in getattr(getattr(stage, "evaluation", None), "rewards", ()) if r not in rewards]
    trainer = run.recipe.machine.trainer
    found = footprint(
        name,
        model,
        needs.train and _as_fed(needs.train, needs.sampling, model, seen, trainer.context),
        needs.sampling,
        prompt_tokens=PROMPT_TOKENS if seen.prompt_tokens is None else seen.prompt_tokens,
        goes_on=(environment := getattr(stage, "environment", None)) is not None and environment.limits.turns > 1,
        reference=needs.reference if isinstance(needs.reference, bool) else run.origin(model.at(needs.reference.path)),
        critic=needs.critic,
        scalar=needs.scalar,
        scorers=[run.origin(scorer.alone()) for scorer in scorers([*rewards, *others])],
        asked=asked,
    )
    if (replicas := run.recipe.machine.samplers.replicas) and hasattr(stage, "lag"):
        found = with_samplers(found, replicas)
    return found if trainer.ranks == 1 else on_each_rank(found, trainer)


def _as_fed(
    train: TrainConfig, sampling: SamplingConfig | None, model: ModelConfig, seen: Seen, context: int
) -> TrainConfig:
    """The same with micro-batches as large as its rows make them.

    They hold the longest row, or rows that are compared, as seen or as its keys allow: a group is cut and these never
    are. They hold no more than a step.
    """
    answered = 0 if sampling is None else (seen.prompt_tokens or PROMPT_TOKENS) + sampling.max_tokens
    uncut = seen.uncut_tokens or min(max(train.max_length or 0, answered), read_max_length(model))
    tokens = CACHED_TOKENS * context if train.microbatch_tokens == "auto" else train.microbatch_tokens
    fed = min(max(tokens, uncut), seen.step_tokens or sys.maxsize)
    return train.model_copy(update={"microbatch_tokens": fed})


def _asked_in(section: Any, tokens: int = 0) -> Iterator[Asked]:
    """The chats of a section that are models on this machine: others answer elsewhere and take no memory here."""
    tokens = getattr(section, "max_tokens", tokens)
    for key, child in children(section):
        if isinstance(child, TeacherConfig):
            yield Asked(role="teacher", model=child, sampling=None)
        if isinstance(child, LocalChat):
            sampling = SamplingConfig(max_tokens=tokens, max_running=child.max_running)
            role = "judge" if isinstance(section, JudgeConfig) else f"author {key}" if key.isdecimal() else key
            yield Asked(role=role, model=child.alone(), sampling=sampling)
        yield from _asked_in(child, tokens)


def settle(train: TrainConfig, model: ModelConfig, sampling: SamplingConfig, *, reference: ModelConfig | bool) -> int:
    """Tokens of a micro-batch: those of the recipe, or what is chosen for this machine where it says auto."""
    if train.microbatch_tokens != "auto":
        return train.microbatch_tokens
    if pick_device(model.device).type == "cpu":
        return CACHED_TOKENS
    small, large = (
        footprint("", model, train.model_copy(update={"microbatch_tokens": tokens}), sampling, reference=reference)
        for tokens in (CACHED_TOKENS, 2 * CACHED_TOKENS)
    )
    return fitting_tokens(small, large)


def footprint(
    name: str,
    model: ModelConfig,
    train: TrainConfig | None,
    sampling: SamplingConfig | None,
    *,
    reference: ModelConfig | bool = False,
    critic: CriticConfig | None = None,
    scalar: bool = False,
    scorers: Sequence[ModelConfig] = (),
    asked: Sequence[Asked] = (),
    prompt_tokens: int = PROMPT_TOKENS,
    goes_on: bool = False,
) -> Footprint:
    """Rehearse a full micro-batch of each model that is trained, and add what sampling and a reference need.

    `scalar`: the model that is trained gives numbers, not tokens; without `train` it is frozen. `scorers`: the reward
    models that rewards ask. `asked`: the models on this machine that judge or write. `goes_on`: turns follow turns, and
    the sampler keeps the beginnings of prompts.
    """
    plan = train or TrainConfig()
    tokens = CACHED_TOKENS if plan.microbatch_tokens == "auto" else plan.microbatch_tokens
    batch = _full_microbatch(min(tokens, 65536), with_entropy=sampling is not None)
    if scalar and train is None:
        roles = [replace(_scorer(model), note="frozen under the gate, which is small")]
    else:
        trained = _scalar("reward", model, plan, batch) if scalar else None
        roles = [trained or _policy(model, train, sampling, batch, prompt_tokens, goes_on=goes_on)]
    if reference:
        other = None if isinstance(reference, bool) or reference.path == model.path else reference
        roles.append(_reference(roles[0], model, other, plan, batch))
    if critic is not None:
        roles.append(_critic(roles[0], model, plan, critic, batch))
    if sampling is not None and sampling.engine == "vllm":
        roles.append(_vllm_copy(roles[0], sampling))
    roles += [_scorer(scorer) for scorer in scorers]
    roles += [_asked(each) for each in asked]
    on_cpu = pick_device(model.device).type == "cpu"
    factor = FRAGMENTS if on_cpu and not frugal(plan) else 1.0
    return Footprint(
        stage=name,
        microbatch_tokens=tokens,
        process=_resident() if on_cpu else 0,
        roles=tuple(role.times(factor) for role in roles),
        available=_free() + _resident() if on_cpu else torch.cuda.mem_get_info()[0],
    )


# ------------------------------------------------------------------------------- one function for each role


def _policy(
    model: ModelConfig,
    train: TrainConfig | None,
    sampling: SamplingConfig | None,
    batch: _Microbatch,
    prompt_tokens: int = PROMPT_TOKENS,
    *,
    goes_on: bool = False,
) -> Role:
    """What is trained or only sampled; the embedded sampler reads its weights and adds a cache."""
    plan, on_cpu = train or TrainConfig(), pick_device(model.device).type == "cpu"
    cache = kept = 0
    with rehearsal(model, lora=plan.lora, checkpointing=plan.gradient_checkpointing) as (language, ledger):
        if sampling is not None and sampling.engine == "embedded":
            kept = int(sampling.cache_gib * 2**30) // PREFIX_SHARE if goes_on and on_cpu else 0
            cache = kept + _cache(language, sampling, prompt_tokens, kept)
        if cache and on_cpu and language.compute == torch.float32:
            cache += sum(layer.weight.nbytes for name, layer in language.module.named_modules() if _copied(name, layer))
        still = Role(role="policy", weights=ledger.now)
        role = still if train is None else _trained("policy", language, ledger, train, batch)
    return replace(role, cache=cache, kept=kept)  # until there are new weights


def _reference(
    policy: Role, model: ModelConfig, other: ModelConfig | None, train: TrainConfig, batch: _Microbatch
) -> Role:
    """The weights that a KL is measured from: another model's, a frozen copy, or with LoRA the adapter's base."""
    if other is not None and "reference" not in train.offload:
        with rehearsal(other, lora=None, checkpointing=False) as (_, ledger):
            return Role(role="reference", weights=ledger.now, note="another model, frozen")
    if other is None and train.lora is not None:
        return Role(role="reference", weights=0, note=f"the policy with its adapter off: saves {_mib(policy.weights)}")
    if "reference" not in train.offload:
        note = "a frozen copy; with train.lora none is needed, with train.offload it rests on the host"
        return Role(role="reference", weights=policy.weights, note=note)
    with rehearsal(other or model, lora=None, checkpointing=False) as (language, ledger), torch.no_grad():
        batch.logp(language)
    return Role(role="reference", weights=0, work=ledger.peak, note="on the host, on the device for its pass alone")


def _critic(policy: Role, model: ModelConfig, train: TrainConfig, config: CriticConfig, batch: _Microbatch) -> Role:
    """The value model: a head on the policy's trunk, or a model of its own that is trained beside it."""
    if config.share_trunk:
        saved = _mib(policy.weights + policy.optimizer)
        return Role(role="critic", weights=0, note=f"a head on the policy's trunk: saves about {saved}")
    # A reward model that an earlier stage will make has the policy's tokenizer, and as a rule its shapes.
    named = None if config.model is None or config.model.path.startswith("@") else config.model.path
    own = model if named is None else model.model_copy(update={"path": named})
    note = "a model of its own; algorithm.critic.share_trunk=true makes it a head of the policy"
    return replace(_scalar("critic", own, train, batch), note=note)


def _asked(each: Asked) -> Role:
    """A judge or writer: weights of its own, and a cache while it answers; each mention in the recipe is a copy."""
    role = _policy(each.model, None, each.sampling, _full_microbatch(256, with_entropy=False))
    return replace(role, role=each.role, note="asked, never trained")


def _scorer(model: ModelConfig) -> Role:
    """A reward model that is only asked; each mention in the recipe is a copy."""
    with rehearsal(model, lora=None, checkpointing=False, scalar=True) as (_, ledger):
        return Role(role="reward model", weights=ledger.now, note="asked, never trained")


def _scalar(role: str, model: ModelConfig, train: TrainConfig, batch: _Microbatch) -> Role:
    """A trained model with a scalar head."""
    lora, checkpointing = train.lora, train.gradient_checkpointing
    with rehearsal(model, lora=lora, checkpointing=checkpointing, scalar=True) as (language, ledger):
        return _trained(role, language, ledger, train, batch)


def _vllm_copy(policy: Role, sampling: SamplingConfig) -> Role:
    """vLLM's weights are its own, and its cache is taken once and kept; those of a server are in its process."""
    if sampling.server is not None:
        return Role(role="vllm", weights=0, note=f"in its own process, at {', '.join(sampling.servers)}")
    kept = int(sampling.cache_gib * 2**30)
    note = f"a copy of the weights, and a cache of {sampling.cache_gib:g} GiB that stays; the embedded engine shares"
    return Role(role="vllm", weights=policy.weights + kept, note=note)


def _trained(role: str, language: LanguageModel, ledger: Ledger, train: TrainConfig, batch: _Microbatch) -> Role:
    """The peak of a micro-batch, with the optimizer's state there as it is from the first step on."""
    weights, learning = ledger.now, list(language.parameters.values())
    if train.optimizer == "adamw8bit":  # its kernels need numbers
        optimizer = sum(p.nbytes + eight_bit_state(p.numel()) for p in learning)
        held = weights + sum(p.nbytes for p in learning)
    else:
        optimizers = Optimizers(language.parameters, train)
        batch.run(language)
        optimizers.step(1.0)
        optimizer = sum(p.nbytes for p in learning) + sum(value.nbytes for value in optimizers.state().values())
        held = weights + optimizer
    ledger.peak = 0
    batch.run(language)
    work = max(0, ledger.peak - held)
    if "optimizer" in train.offload:  # a part at a time comes to the device, between the micro-batches
        optimizer, work = sum(p.nbytes for p in learning), max(work, optimizers.largest_on_device())
    if train.quantize is not None:  # one matrix at a time is dequantised for its product
        frozen = quantisable(language.module)
        weights -= int(sum(m.numel() * (4 - NF4_BYTES) for m in frozen))
        work += max(m.nbytes for m in frozen)
    return Role(role=role, weights=weights, optimizer=optimizer, work=work, gathered=_gathered(language))


def _gathered(language: LanguageModel) -> int:
    """Bytes of parameters that ranks have whole at once, with the gradients of one layer and of all outside them."""
    inside = [sum(p.nbytes for p in layer.parameters()) for layer in layers_of(language.module)]
    outside = sum(p.nbytes for p in language.module.parameters()) - sum(inside)
    return 2 * outside + 3 * max(inside, default=0)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


@dataclass(frozen=True, slots=True)
class _Microbatch:
    """A full micro-batch, made outside the rehearsal: who sees whom depends on its numbers."""

    packed: Packed
    batch: Batch
    with_entropy: bool

    def run(self, model: LanguageModel) -> None:
        if is_scalar(model.module):
            model.value_at(model.stream(self.packed)[self.packed.source_T]).sum().backward()
            return
        logp_T, entropy_T = self.logp(model)
        loss, _ = CrossEntropy()(Outputs(logp_T=logp_T, entropy_T=entropy_T), self.batch)
        loss.backward()

    def logp(self, model: LanguageModel) -> tuple[Tensor, Tensor | None]:
        states_TD = model.stream(self.packed)[self.packed.source_T]
        return model.logp_at(states_TD, self.packed.target_T, temperature=1.0, with_entropy=self.with_entropy)


def _full_microbatch(tokens: int, *, with_entropy: bool) -> _Microbatch:
    """Sequences of some 256 tokens, all trained; attention's work memory does not depend on how they are cut."""
    count = -(-tokens // 256)
    length = -(-tokens // count)
    row = TokenRow(tokens=np.zeros(length, np.int32), trained=np.arange(length) > 0)
    atoms = weigh([row] * count)
    packed = pack(atoms, torch.device("cpu"))
    assert packed.layout.parts  # computed here, where numbers are numbers
    assert packed.layout.positions_N is not None
    return _Microbatch(packed, as_batch(atoms, torch.zeros(1)), with_entropy)


def _cache(model: LanguageModel, sampling: SamplingConfig, prompt_tokens: int, kept: int) -> int:
    """Bytes of the key-value cache beside what is kept, and of choosing tokens, with every slot in use."""
    config = model.module.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = min(prompt_tokens + sampling.max_tokens, model.max_length)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.compute.itemsize
    choosing = model.vocabulary * (4 + 4 + 4)  # logits, the same by temperature, probabilities
    running = min(sampling.max_running, max(1, int((sampling.cache_gib * 2**30 - kept) / (length * per_token))))
    return int(running * (length * per_token + choosing))


def _copied(name: str, layer: nn.Module) -> bool:
    """Whether the sampler holds a copy of the weights while it is at work (`models.matmul.product`)."""
    return type(layer) is nn.Linear and not name.endswith("base_layer")  # an adapter's


def _resident() -> int:
    """Bytes that this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _free() -> int:
    """Bytes of memory that could be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024
