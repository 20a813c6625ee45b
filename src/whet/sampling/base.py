"""The sampling door: tokens with their log-probabilities, which a policy gradient needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from whet.records import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion."""

    max_tokens: int
    """Most tokens, the stop token included."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    """Strings that end the completion with the token that completes one of them."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}; use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}; leave it out for no limit")
        if not all(self.stop):
            raise ValueError("stop must hold no empty string, which would end every completion at once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. It alone decides what is sampled, whatever other requests there are."""

    prompt: Sequence[int] | np.ndarray
    seed: int
    """Decides its random numbers."""
    params: SamplingParams
    samples: int = 1
    """How many requests of this prompt belong together: whether keeping the prompt apart from its answers pays."""
    heard: Callable[[list[int]], None] | None = field(default=None, compare=False)
    """Told after each step which tokens are written so far, by a sampler that can; it must not raise."""
    goes_on: bool = False
    """Whether a later prompt is likely to begin with this one: what is computed of it may be kept until then."""
    version: int | None = None
    """Of the weights that it is to be sampled with, where the sampler keeps older ones; None: the newest."""


class TokenSampler(Protocol):
    """Samples tokens with their log-probabilities under the weights of a known version."""

    @property
    def version(self) -> int:
        """How many weight hand-overs it has seen."""

    async def sample(self, request: Request) -> Completion:
        """The completion; `SamplerError` where there is none, for this request alone.

        Any number of requests may be awaited together: those that wait are batched, and equal prompts computed once.
        Cancelling the awaiting task gives the request up and frees its place.
        """


class PolicySampler(TokenSampler, Protocol):
    """A token sampler over the weights that a trainer hands over."""

    def publish(self, version: int) -> None:
        """Sample with the trainer's weights as they are now, under this version. No request may be running."""


class ApartSampler(PolicySampler, Protocol):
    """A policy sampler with a copy of the weights: it goes on while the trainer changes its own."""

    @property
    def gaps(self) -> Mapping[int, float]:
        """Mean |log-probability difference| from the trainer on a probe of each version that was handed over; nats."""

    def describe(self) -> str:
        """Who owes what since when, for an error."""

    def save(self, folder: Path) -> None:
        """The past versions that requests may still name."""

    def load(self, folder: Path) -> None:
        """Have the versions that `save` kept."""

    def close(self) -> None:
        """End what it has started."""
