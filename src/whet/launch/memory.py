"""Will it fit? The peak memory of each stage, before anything is loaded.

A training step is rehearsed on tensors without content (`models.footprint`) with a full micro-batch; the key-value
cache of the sampler is arithmetic. On a CPU the process itself and the allocator's fragments are added, as measured.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from whet.algorithms.sft import Imitate, weigh
from whet.config import EvalStage, ModelConfig, RLStage, SamplingConfig, TrainConfig
from whet.models.footprint import rehearsal
from whet.models.language import LanguageModel
from whet.models.machine import pick_device
from whet.models.pack import Packed, pack
from whet.pipeline.run import Run
from whet.records import TokenRow
from whet.training.base import Batch, Outputs
from whet.training.engine import as_batch
from whet.training.optim import Optimizers

FRAGMENTS = 1.14
"""What the C allocator holds beyond what is alive, on a CPU (docs/memory.md), unless a stage is `frugal`."""
PROMPT_TOKENS = 512
"""Length of a prompt that a plan reckons with, where the data are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peak memory of a stage, in bytes, and what it is made of."""

    stage: str
    microbatch_tokens: int
    process: int
    """Python and the libraries, on a CPU; 0 on a GPU."""
    weights: int
    """The model, and a frozen copy of it where a KL needs one."""
    optimizer: int
    """Gradients and the optimizer's state."""
    work: int
    """Activations, logits and temporaries at the peak of a micro-batch."""
    cache: int
    """Keys, values and logits of the sequences that are sampled side by side; not alive while training."""
    available: int
    """Free on the device, and what this process already has of it."""

    @property
    def peak(self) -> int:
        """The larger of training and sampling."""
        return self.process + self.weights + self.optimizer + max(self.work, self.cache)

    @property
    def advice(self) -> str:
        """Empty where it fits; else what to change, the largest saving first."""
        if self.peak <= self.available:
            return ""
        savings = {
            f"train.microbatch_tokens={self.microbatch_tokens // 4} or train.gradient_checkpointing=true": self.work,
            "sampling.max_running=16 or a smaller sampling.max_tokens": self.cache,
            "train.lora.rank=16": self.optimizer,
        }
        return "does not fit; try " + ", then ".join(sorted(savings, key=lambda change: -savings[change]))


def footprints(run: Run) -> list[Footprint]:
    """The footprint of every stage of a run, in order."""
    return [_footprint(run, name) for name in run.recipe.stages]


def frugal(train: TrainConfig) -> bool:
    """Whether the user traded speed for memory; on a CPU the allocator then gives back what is free."""
    return train.gradient_checkpointing or train.lora is not None


def _footprint(run: Run, name: str) -> Footprint:
    stage, model = run.recipe.stages[name], run.model_of(name)
    if model.path.startswith(str(run.folder)) and not Path(model.path).is_dir():
        model = run.recipe.model  # what an earlier stage will make has the shapes of what it started from
    if isinstance(stage, EvalStage):
        return footprint(name, model, None, stage.sampling)
    if isinstance(stage, RLStage):
        return footprint(name, model, stage.train, stage.sampling, reference=stage.algorithm.kl.place != "none")
    return footprint(name, model, stage.train, None)


def footprint(
    name: str,
    model: ModelConfig,
    train: TrainConfig | None,
    sampling: SamplingConfig | None,
    *,
    reference: bool = False,
) -> Footprint:
    """Rehearse a full micro-batch of training, where there is any, and add what sampling needs."""
    plan = train or TrainConfig()
    batch = _full_microbatch(min(plan.microbatch_tokens, 65536), with_entropy=sampling is not None)
    with rehearsal(model, lora=plan.lora, checkpointing=plan.gradient_checkpointing) as (language, ledger):
        weights = ledger.now
        optimizer = 0
        if train is not None:
            optimizers = Optimizers(language.parameters, plan)
            batch.run(language)
            optimizers.step(lr=plan.lr, muon_lr=plan.muon_lr)  # the state is there from the first step on
            sizes = [value.nbytes for value in optimizers.state().values()]
            optimizer = sum(sizes) + sum(p.nbytes for p in language.parameters.values())
            ledger.peak = 0
            batch.run(language)
        work = max(0, ledger.peak - weights - optimizer) if train is not None else 0
        cache = _cache(language, sampling) if sampling is not None else 0
    copies = 2 if reference and plan.lora is None else 1
    on_cpu = pick_device(model.device).type == "cpu"
    factor = FRAGMENTS if on_cpu and not frugal(plan) else 1.0
    return Footprint(
        stage=name,
        microbatch_tokens=plan.microbatch_tokens,
        process=_resident() if on_cpu else 0,
        weights=int(weights * copies * factor),
        optimizer=int(optimizer * factor),
        work=int(work * factor),
        cache=int(cache * factor),
        available=_free() + _resident() if on_cpu else torch.cuda.mem_get_info()[0],
    )


@dataclass(frozen=True, slots=True)
class _Microbatch:
    """A full micro-batch, made outside the rehearsal: who sees whom depends on its numbers."""

    packed: Packed
    batch: Batch
    with_entropy: bool

    def run(self, model: LanguageModel) -> None:
        logp_T, entropy_T = model.logp(self.packed, temperature=1.0, with_entropy=self.with_entropy)
        loss, _ = Imitate()(Outputs(logp_T=logp_T, entropy_T=entropy_T), self.batch)
        loss.backward()


def _full_microbatch(tokens: int, *, with_entropy: bool) -> _Microbatch:
    """Sequences of 256 tokens, all trained; attention's work memory does not depend on how they are cut."""
    length = min(256, tokens)
    row = TokenRow(tokens=(0,) * length, trained=(False,) + (True,) * (length - 1))
    atoms = weigh([row] * (tokens // length))
    packed = pack(atoms, torch.device("cpu"))
    assert packed.layout.buckets  # computed here, where numbers are numbers
    assert packed.layout.positions_N is not None
    return _Microbatch(packed, as_batch(atoms, torch.zeros(1)), with_entropy)


def _cache(model: LanguageModel, sampling: SamplingConfig) -> int:
    """Bytes of the key-value cache and of choosing tokens, with every slot in use."""
    config = model.module.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = min(PROMPT_TOKENS + sampling.max_tokens, model.max_length)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 4
    choosing = model.vocabulary * (4 + 4 + 8 + 8)  # logits, log-probabilities, and their sum in double precision
    return int(sampling.max_running * (length * per_token + choosing))


def _resident() -> int:
    """Bytes that this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _free() -> int:
    """Bytes of memory that could be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024
