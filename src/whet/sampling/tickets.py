"""What the engine knows of a request and of its prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whet.models.attention import Tree, TreeLayout
from whet.models.language import LanguageModel
from whet.models.marks import Routing
from whet.sampling.answers import SamplingKind
from whet.sampling.base import Request
from whet.sampling.kv_cache import Beginning, Member, Prefixes, Slab, size_class
from whet.sampling.layouts import DecodeBatch, Entry, Prefill, Shared

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
    version: int = 0
    """Of the weights that wrote its first token."""
    switches: int = 0
    """The hand-overs that had been made by then, of those while the engine was at work."""

    def later(self, switches: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """(first token, version) for each hand-over since it began, of those after so many steps each."""
        return tuple((at - self.born + 1, version) for at, version in switches[self.switches :])

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

    key: tuple[bytes, bool, int] = field(kw_only=True)
    """Its tokens, whether it is kept apart, and the hand-over since which it is computed: none of another is read."""
    tokens: np.ndarray = field(kw_only=True)
    waiting: deque[Ticket] = field(default_factory=deque)
    running: list[Ticket] = field(default_factory=list)
    hidden_D: Tensor | None = None
    """The hidden state after it, once that is computed."""
    marks: int = 0
    """The state of the marks of roles after it."""

    def uncached(self, salt: int) -> SharedPrompt:
        """The same, of which nothing is computed, for those that wait for this one."""
        fresh = SharedPrompt(key=(*self.key[:2], salt), tokens=self.tokens, waiting=self.waiting)
        for ticket in fresh.waiting:
            ticket.prompt = fresh
        self.waiting = deque()
        return fresh

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


def route_prompts(prompts: Sequence[SharedPrompt], routing: Routing | None) -> None:
    """Send a stream of these prompts through adapters by their tokens' roles, where that is done."""
    if routing is not None:
        states_P = routing.read([prompt.tokens for prompt in prompts])
        for prompt, state in zip(prompts, states_P, strict=True):
            prompt.marks = state


def batch_of(
    whole: Sequence[Slab], tails: Sequence[Slab], prompts: Sequence[Slab], longest: int, device: torch.device
) -> DecodeBatch:
    """The rows of these slabs, those whose prompt is apart beside their prompts; the longest has so many tokens."""
    number = {row: at for at, row in enumerate(row for slab in tails for row in slab.members)}
    place_T, shared, at = [0] * len(number), [], 0
    for slab in prompts:
        asking = [p for p in slab.members if isinstance(p, SharedPrompt)]
        slab.arrange([len(prompt.tokens) - 1 for prompt in asking])
        shared.append(Shared.of(slab, [[number[row] for row in prompt.running] for prompt in asking], device))
        for prompt in asking:
            for rank, row in enumerate(prompt.running):
                place_T[number[row]] = at + rank
            at += shared[-1].shape[1]
    places = torch.tensor(place_T, dtype=torch.long, device=device)
    return DecodeBatch((*whole, *tails), len(whole), shared, places, longest)


def prefill_of(
    prompts: Sequence[SharedPrompt],
    rows: Mapping[SharedPrompt, Sequence[Ticket]],
    known: Sequence[Beginning],
    model: LanguageModel,
) -> tuple[Tensor, Tensor, Prefill]:
    """(tokens_N, positions_N, layout) of these prompts, without what is known of them; sent through their adapters."""
    entries, at = [], 0
    for prompt, beginning in zip(prompts, known, strict=True):
        member, places = (prompt, 1) if prompt.apart else (rows[prompt][0], len(rows[prompt]))
        assert member.slab is not None
        tokens = slice(at, at := at + len(prompt.tokens) - beginning.tokens)
        entries.append(Entry(tokens, member.slab, member.place, places, beginning))
    route_prompts(prompts, model.routing)
    whole = TreeLayout(tuple(Tree(0, (len(prompt.tokens),)) for prompt in prompts), model.device, model.backend)
    both = [(prompt.tokens, beginning.tokens) for prompt, beginning in zip(prompts, known, strict=True)]
    new = [torch.from_numpy(tokens[start:]) for tokens, start in both]
    positions = [torch.arange(start, len(tokens)) for tokens, start in both]
    return torch.cat(new).to(model.device), torch.cat(positions).to(model.device), Prefill(entries, whole)


def learn(
    prompts: Sequence[SharedPrompt],
    rows: Mapping[SharedPrompt, Sequence[Ticket]],
    hidden_ND: Tensor,
    layout: Prefill,
    prefixes: Prefixes,
) -> None:
    """Note what was computed of these prompts: the last hidden state, and what a later prompt may begin with."""
    for prompt, entry in zip(prompts, layout.entries, strict=True):
        prompt.hidden_D = hidden_ND[entry.tokens.stop - 1].clone()
        if any(row.request.goes_on for row in rows[prompt]):
            prefixes.keep(prompt.tokens, tuple(entry.computed), entry.known.tokens)
