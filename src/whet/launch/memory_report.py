"""What a stage needs of memory, in bytes: the record of a plan, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from whet.config.machine import TrainerRanks

ROOM = 0.5
"""Share of a GPU's free memory that micro-batches are chosen for; a critic, the sampler and fragments have the rest."""
FULL_TOKENS = 32768
"""Tokens of a micro-batch beyond which a GPU gets no faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One model of a stage, in bytes."""

    role: str
    weights: int
    optimizer: int = 0
    """Gradients and the optimizer's state."""
    work: int = 0
    """Activations, logits and temporaries at the peak of a micro-batch."""
    cache: int = 0
    """Keys, values and logits of the sequences that are sampled side by side; not alive while training."""
    kept: int = 0
    """Of the cache what stays while training, where the sampler is in the trainer's process."""
    gathered: int = 0
    """What is whole on a rank at the peak of a pass: all outside the layers, and the layers at hand."""
    note: str = ""
    """What sharing saves, or what could be shared."""

    def times(self, factor: float) -> Role:
        """With all sizes times a factor."""
        sizes: dict[str, Any] = {n: int(v * factor) for n, v in asdict(self).items() if isinstance(v, int)}
        return replace(self, **sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peak memory of a stage, in bytes, and what it is made of."""

    stage: str
    microbatch_tokens: int
    process: int
    """Python and the libraries, on a CPU; 0 on a GPU."""
    roles: tuple[Role, ...]
    available: int
    """Free on the device, and what this process already has of it."""
    ranks: int = 1
    """Processes of the trainer; with several this is the footprint of each."""
    driver: int = 0
    """Beside the ranks: a copy of the policy and the cache, for sampling."""
    samplers: int = 0
    """The sampler processes, all together."""

    @property
    def everything(self) -> int:
        """What is taken of `available`: on a CPU all processes have their memory from the same machine."""
        if self.ranks == 1 or self.process == 0:
            return self.peak + self.samplers
        return self.ranks * self.peak + self.process + self.driver + self.samplers

    @property
    def weights(self) -> int:
        """Of all models."""
        return sum(role.weights for role in self.roles)

    @property
    def optimizer(self) -> int:
        """Of all models that learn."""
        return sum(role.optimizer for role in self.roles)

    @property
    def work(self) -> int:
        """One model is at work at a time, beside what the sampler keeps."""
        return max(role.work for role in self.roles) + sum(role.kept for role in self.roles)

    @property
    def cache(self) -> int:
        """Of the sampler."""
        return max(role.cache for role in self.roles)

    @property
    def peak(self) -> int:
        """The larger of training and sampling."""
        return self.process + self.weights + self.optimizer + max(self.work, self.cache)

    @property
    def advice(self) -> str:
        """Empty where it fits; else what to change, the largest saving first."""
        if self.everything <= self.available:
            return ""
        savings = {
            f"train.microbatch_tokens={self.microbatch_tokens // 4} or train.gradient_checkpointing=true": self.work,
            "sampling.max_running=16 or a smaller sampling.max_tokens": self.cache,
            "train.lora.rank=16": self.optimizer,
        }
        return "does not fit; try " + ", then ".join(sorted(savings, key=lambda change: -savings[change]))


SPREAD = {"policy", "reference", "teacher", "reward", "critic"}
"""Roles whose models are spread over the trainer's ranks; the others stay in the driver."""


def with_samplers(need: Footprint, replicas: int) -> Footprint:
    """With so many sampler processes, and the one that they are copies of: each has weights and a cache of its own."""
    policy, *others = need.roles
    samplers = need.process + (replicas + 1) * policy.weights + replicas * policy.cache
    return replace(need, roles=(replace(policy, cache=0, kept=0), *others), samplers=samplers)


def on_each_rank(need: Footprint, trainer: TrainerRanks) -> Footprint:
    """The footprint of one of several ranks: of its shards, and of its part of a micro-batch."""
    shards = trainer.ranks // trainer.replicate
    spread = [role for role in need.roles if role.role in SPREAD]
    beside = [role for role in need.roles if role.role not in SPREAD]
    samples = need.cache + need.samplers > 0
    return replace(
        need,
        roles=tuple(
            replace(
                role,
                weights=-(-role.weights // shards),
                optimizer=-(-role.optimizer // shards),
                work=-(-role.work // trainer.context) + role.gathered,
                cache=0,
                kept=0,
            )
            for role in spread
        ),
        ranks=trainer.ranks,
        driver=sum(role.weights for role in beside) + need.cache + samples * need.roles[0].weights,
    )


def fitting_tokens(small: Footprint, large: Footprint) -> int:
    """Tokens of a micro-batch with which a stage stays within `ROOM` of what is available, from two footprints.

    A multiple of 256 between 256, which is tried where even that is too much, and `FULL_TOKENS`.
    """
    per_token = (large.work - small.work) / (large.microbatch_tokens - small.microbatch_tokens)
    fixed = small.process + small.weights + small.optimizer + small.work - per_token * small.microbatch_tokens
    tokens = (ROOM * small.available - fixed) / max(per_token, 1)
    return int(min(max(tokens, 256), FULL_TOKENS)) // 256 * 256
