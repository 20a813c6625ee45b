"""The sampling door: token samplers may feed a policy gradient, chat samplers may not. The type says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from whet.errors import SamplerError
from whet.records import Completion, Message


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

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}; use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}; leave it out for no limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. Its seed alone decides its random numbers, whatever else is in the batch."""

    prompt: tuple[int, ...]
    seed: int
    params: SamplingParams


class TokenSampler(Protocol):
    """Samples tokens with their log-probabilities under the weights of a known version."""

    @property
    def version(self) -> int:
        """How many weight hand-overs it has seen."""

    def sample(self, requests: Sequence[Request]) -> Sequence[Completion | SamplerError]:
        """One completion for each request, in order. Requests with equal prompts share the prompt's work.

        A request that fails alone is answered with its error; what fails for all of them is raised.
        """


class ChatSampler(Protocol):
    """Answers conversations with text: an endpoint, a teacher, a judge. No tokens, no log-probabilities."""

    def chat(self, conversations: Sequence[Sequence[Message]], params: SamplingParams) -> list[Message]:
        """One assistant message for each conversation; raises `SamplerError` where the endpoint fails."""
