"""The embedded engine: continuous batching over the trainer's own weights.

Every distinct prompt is computed once; its keys and values are copied into the slots of all its answers. The rows
that run are the first slots of the cache; when enough have ended the others move up and waiting requests enter.
Weights are the trainer's (same tensors, no hand-over), so version and weights cannot disagree.

A request's random numbers come from its own seed: one uniform number per token, used to invert the cumulative
distribution. What else is in the batch does not matter (beyond the rounding of batched matrix products).

Legend: S running sequences, P prompts of one admission, K key-value heads, D head size, L cache length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whet.models.attention import Call, Tree, TreeLayout
from whet.models.language import LanguageModel
from whet.records import Completion, Ending
from whet.sampling.base import Request
from whet.sampling.choose import choose

PREFILL_TOKENS = 8192
"""Most prompt tokens computed at once."""
COMPACT_SHARE = 0.25
"""Ended rows leave, and waiting ones enter, when at least this share of the running ones has ended."""


class EmbeddedSampler:
    """`TokenSampler` over a model in this process."""

    def __init__(self, model: LanguageModel, *, max_running: int = 256) -> None:
        self.model = model
        self.max_running = max_running
        self.version = 0

    def publish(self, version: int) -> None:
        """Take note that the shared weights are now of this version."""
        self.version = version

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        if not requests:
            return []
        self.model.module.eval()
        batch = _Running(self.model, requests, min(self.max_running, len(requests)))
        while batch.advance():
            pass
        return [
            _complete(tokens, logps, r, self.version)
            for (tokens, logps), r in zip(batch.results, requests, strict=True)
        ]


def _complete(tokens: list[int], logps: list[float], request: Request, version: int) -> Completion:
    ending = Ending.STOP if tokens[-1] in request.params.stop_ids else Ending.LENGTH
    return Completion(tokens=tuple(tokens), logprobs=tuple(logps), version=version, ending=ending)


@dataclass
class _Cache:
    """Keys and values of the running sequences, one pair of tensors (S, K, L, D) for each layer."""

    slots: int
    length: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of a layer, made when the layer first asks (like: (1, K, N, D))."""
        while len(self.layers) <= index:
            shape = (self.slots, like.shape[1], self.length, like.shape[3])
            self.layers.append((like.new_zeros(shape), like.new_zeros(shape)))
        return self.layers[index]

    def keep(self, alive: Tensor, used: int) -> None:
        """Move these slots to the front; only the first `used` positions hold anything."""
        for pair in self.layers:
            for cache in pair:
                cache[: len(alive), :, :used] = cache[alive, :, :used]


class _Prefill:
    """Computes prompts as a packed stream, and copies each one's keys and values into the slots of its answers."""

    def __init__(self, layout: TreeLayout, cache: _Cache, copies: Sequence[tuple[slice, Tensor]]) -> None:
        self.layout, self.cache, self.copies = layout, cache, copies

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        keys, values = self.cache.layer(call.layer, key)
        for tokens, slots in self.copies:
            length = tokens.stop - tokens.start
            keys[slots, :, :length] = key[0, :, tokens]
            values[slots, :, :length] = value[0, :, tokens]
        return self.layout.attend(query, key, value, call)


class _Decode:
    """One new token for each running sequence: writes its key and value, attends to all before it."""

    def __init__(self, cache: _Cache, positions_S: Tensor) -> None:
        self.cache, self.positions_S = cache, positions_S
        self.rows_S = torch.arange(len(positions_S), device=positions_S.device)
        self.used = int(positions_S.max()) + 1
        self.distance_SL = positions_S[:, None] - torch.arange(self.used, device=positions_S.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        keys, values = self.cache.layer(call.layer, key)
        keys[self.rows_S, :, self.positions_S] = key[0].transpose(0, 1)
        values[self.rows_S, :, self.positions_S] = value[0].transpose(0, 1)
        S, heads, size, K = len(self.rows_S), query.shape[1], query.shape[3], key.shape[1]
        # The query heads that share a key-value head are rows of one small matrix product.
        grouped = query[0].transpose(0, 1).reshape(S, K, heads // K, size)
        scores = grouped @ keys[:S, :, : self.used].transpose(-1, -2) * call.scale
        hidden = self.distance_SL < 0
        if call.window is not None:
            hidden = hidden | (self.distance_SL >= call.window)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        out = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values[:S, :, : self.used]
        return out.reshape(1, S, heads, size)


class _Running:
    """The state of one `sample` call: who waits, who runs in which slot, what each has written."""

    def __init__(self, model: LanguageModel, requests: Sequence[Request], slots: int) -> None:
        self.model, self.requests = model, requests
        longest = max(len(r.prompt) + r.params.max_tokens for r in requests)
        self.cache = _Cache(slots, longest)
        self.waiting = deque(_by_prompt(requests))
        self.results: list[tuple[list[int], list[float]]] = [([], []) for _ in requests]
        self.uniforms = [
            np.random.Generator(np.random.Philox(key=r.seed)).random(r.params.max_tokens) for r in requests
        ]
        self.rows: list[int] = []  # the request in each running slot
        self.tokens_S = torch.zeros(0, dtype=torch.long)
        self.alive: list[bool] = []

    def advance(self) -> bool:
        """Admit whoever fits, then one token for everybody; False when all is done."""
        ended = self.alive.count(False)
        if ended and (ended >= COMPACT_SHARE * len(self.rows) or (self.waiting and ended == len(self.rows))):
            self._compact()
        if self.waiting and len(self.rows) <= (1 - COMPACT_SHARE) * self.cache.slots:
            while self.waiting and len(self.rows) < self.cache.slots:
                self._admit()
        elif self.rows:
            self._decode()
        return bool(self.waiting or any(self.alive))

    def _compact(self) -> None:
        alive = [slot for slot, lives in enumerate(self.alive) if lives]
        index = torch.tensor(alive, dtype=torch.long)
        used = max((self._position(self.rows[slot]) for slot in alive), default=0)
        self.cache.keep(index.to(self.model.device), used)
        self.rows, self.tokens_S = [self.rows[slot] for slot in alive], self.tokens_S[index]
        self.alive = [True] * len(alive)

    def _admit(self) -> None:
        """Prefill waiting prompts until the slots or the budget are full, and sample every answer's first token."""
        free = self.cache.slots - len(self.rows)
        stream: list[int] = []
        copies: list[tuple[slice, Tensor]] = []
        trees: list[Tree] = []
        entered: list[int] = []
        sources: list[int] = []
        while self.waiting and free and (not stream or len(stream) + len(self.waiting[0][0]) <= PREFILL_TOKENS):
            prompt, members = self.waiting.popleft()
            if len(members) > free:  # its prompt is computed again for the rest, when there is room
                self.waiting.appendleft((prompt, members[free:]))
                members = members[:free]
            slots = torch.arange(len(members)) + len(self.rows) + len(entered)
            copies.append((slice(len(stream), len(stream) + len(prompt)), slots.to(self.model.device)))
            stream += prompt
            trees.append(Tree(0, (len(prompt),)))
            entered += members
            sources += [len(stream) - 1] * len(members)
            free -= len(members)
        device = self.model.device
        layout = TreeLayout(tuple(trees), device, self.model.backend)
        hidden = self.model.hidden(
            torch.tensor(stream, device=device), layout.positions_N, _Prefill(layout, self.cache, copies)
        )
        last = sorted(set(sources))
        logits = self.model.logits(hidden[torch.tensor(last, device=device)])
        which = torch.tensor([last.index(s) for s in sources], device=device)
        self.rows += entered
        self.alive += [True] * len(entered)
        self.tokens_S = torch.cat([self.tokens_S, self._write(entered, len(self.rows) - len(entered), logits[which])])

    def _decode(self) -> None:
        positions = torch.tensor([self._position(request) - 1 for request in self.rows], device=self.model.device)
        hidden = self.model.hidden(self.tokens_S.to(self.model.device), positions, _Decode(self.cache, positions))
        self.tokens_S = self._write(self.rows, 0, self.model.logits(hidden))

    def _write(self, members: Sequence[int], first_slot: int, logits_SV: Tensor) -> Tensor:
        """Choose one token for each of these requests, note it, and mark those that end."""
        uniform = [self.uniforms[r][min(len(self.results[r][0]), len(self.uniforms[r]) - 1)] for r in members]
        tokens_S, logp_S = choose(logits_SV, [self.requests[r].params for r in members], uniform)
        for slot, (request, token, logp) in enumerate(
            zip(members, tokens_S.tolist(), logp_S.tolist(), strict=True), first_slot
        ):
            if not self.alive[slot]:
                continue
            written, logps = self.results[request]
            written.append(token)
            logps.append(logp)
            params = self.requests[request].params
            self.alive[slot] = token not in params.stop_ids and len(written) < params.max_tokens
        return tokens_S.cpu()

    def _position(self, request: int) -> int:
        """Tokens of this request so far; an ended row stays where it ended."""
        return len(self.requests[request].prompt) + len(self.results[request][0])


def _by_prompt(requests: Sequence[Request]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Requests with the same prompt together, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.prompt, []).append(number)
    return list(groups.items())
