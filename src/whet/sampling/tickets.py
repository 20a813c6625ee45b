"""What the engine knows of a request and of its prompt."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from whet.sampling.answers import SamplingKind
from whet.sampling.base import Request
from whet.sampling.slabs import Member, size_class

WHOLE, TAILS, PROMPTS = "whole", "tails", "prompts"
"""Slabs of rows with their prompt in front, of rows whose prompt is apart, and of such prompts."""


@dataclass(eq=False, slots=True)
class Ticket(Member):
    """A request on its way: waiting, or running as a row of a slab."""

    request: Request = field(kw_only=True)
    prompt: SharedPrompt = field(kw_only=True)
    kind: SamplingKind = field(kw_only=True)
    front: int = field(kw_only=True)
    """Columns before its answer: its prompt's, where that is not kept apart."""
    line: int = -1
    """Where its answer is written."""
    born: int = 0
    """The steps that had been taken when it began to run."""

    @property
    def role(self) -> str:
        """Of the slabs in which it stands."""
        return TAILS if self.prompt.apart else WHOLE

    @property
    def span(self) -> int:
        """Most tokens, prompt and answer."""
        return len(self.prompt.tokens) + self.request.params.max_tokens

    @property
    def cost(self) -> int:
        """Cached tokens that its row may come to need."""
        return size_class(self.front + self.request.params.max_tokens)


@dataclass(eq=False, slots=True)
class SharedPrompt(Member):
    """A prompt that tickets wait for or run on; it has a place of its own where it is kept apart."""

    key: tuple[bytes, bool] = field(kw_only=True)
    tokens: np.ndarray = field(kw_only=True)
    waiting: deque[Ticket] = field(default_factory=deque)
    running: list[Ticket] = field(default_factory=list)
    hidden_D: Tensor | None = None
    """The hidden state after it, once that is computed."""

    @property
    def apart(self) -> bool:
        """Whether its keys and values are kept once for all its rows."""
        return self.key[1]

    @property
    def cost(self) -> int:
        """Cached tokens that it needs where it is kept apart."""
        return size_class(len(self.tokens))

    @property
    def known(self) -> bool:
        """Whether its keys and values are there to be read."""
        return self.slab is not None if self.apart else bool(self.running)
