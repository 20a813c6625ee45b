"""The KV cache: the sequences that are being written, in slabs by size class, and beginnings of prompts in blocks.

A slab holds rows of one width. A row begins in its first column, so the place of a token in its slab follows from its
position alone; a row that outgrows its slab is copied into a wider one. Widths are multiples of an eighth of the next
power of two, so at most an eighth of what a step reads is padding (below 256 tokens, at most `GRANULE` columns).

Two facts about a row never depend on its neighbours: where its tokens stand, and the shapes of the products that meet
them. Together with products whose rows do not depend on their number (`models.matmul`), this makes an answer the
same bits in whatever company it is written: columns that a row does not see are exact zeros after its own.

Keys are kept transposed, (D, W): a product of few queries with them is then up to a third faster where they come from
memory.

A prompt is computed in blocks that begin and end at fixed positions, each with the keys and values before it. So a
block has the same bits whatever follows it, and whether it is read from here or computed again shows in no answer: it
may be forgotten at any time. That is what an episode of several turns reads of its earlier ones.

Legend: n rows of a slab, K key-value heads, D head size, W width, L tokens of a prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GRANULE = 32
"""The least width of a slab, and the least difference of two."""
GROWTH = 1.5
"""A slab that is full grows at least by this factor."""
FIRST = 64
"""Tokens of the first block."""
LEAST_BITS = 4
"""A block has at least 16 tokens, and an eighth of the power of two below its beginning."""

Held = tuple[tuple[Tensor, Tensor], ...]
"""Of each layer, keys and values (K, L, D) of some tokens."""
WHOLE, TAILS, PROMPTS = "whole", "tails", "prompts"
"""Slabs of rows with their prompt in front, of rows whose prompt is apart, and of such prompts."""


def size_class(tokens: int) -> int:
    """The width of the slab for a row of so many tokens."""
    granule = max(GRANULE, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // granule) * granule


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one token."""
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Member:
    """Something that has a place in a slab."""

    slab: Slab | None = None
    place: int = -1


class Slab:
    """Members of one width: of each layer, keys (capacity * K, D, W) and values (capacity * K, W, D)."""

    def __init__(
        self, width: int, shapes: Sequence[LayerShape], device: torch.device, *, capacity: int | None = None
    ) -> None:
        """Of this width; with a `capacity` its tensors stay where they are while no more members come than that."""
        self.width, self.capacity = width, 0
        self.members: list[Member] = []
        self._shapes, self._device = shapes, device
        self.keys = [torch.zeros(0, s.key_size, width, dtype=s.dtype, device=device) for s in shapes]
        self.values = [torch.zeros(0, width, s.value_size, dtype=s.dtype, device=device) for s in shapes]
        self.next_n = torch.zeros(0, dtype=torch.long, device=device)
        self._places: dict[tuple[int, int], Tensor] = {}
        self._biases: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        self._least = capacity or 0
        self.resize(self._least)

    def add(self, members: Sequence[Member]) -> None:
        """Give these the next places."""
        for member in members:
            member.slab, member.place = self, len(self.members)
            self.members.append(member)
        if len(self.members) > self.capacity:
            self.resize(max(len(self.members), int(GROWTH * self.capacity)))

    def remove(self, members: Sequence[Member]) -> None:
        """These are done; the last ones take their places."""
        gone = {member.place for member in members}
        left = len(self.members) - len(gone)
        holes = sorted(place for place in gone if place < left)
        movers = [member for member in self.members[left:] if member.place not in gone]
        if movers:
            self._copy(self, [member.place for member in movers], holes)
        for member, hole in zip(movers, holes, strict=True):
            self.members[hole], member.place = member, hole
        del self.members[left:]

    def take(self, members: Sequence[Member]) -> None:
        """Copy these from the narrower slab in which they stand."""
        (source,) = {member.slab for member in members}
        assert source is not None
        leaving = [Member(source, member.place) for member in members]
        for member in leaving:
            source.members[member.place] = member
        self.add(members)
        self._copy(source, [member.place for member in leaving], [member.place for member in members])
        source.remove(leaving)

    @property
    def held(self) -> int:
        """Tokens that there is memory for."""
        return self.capacity * self.width

    def trim(self) -> None:
        """Give back the memory of places that no member has."""
        self.resize(max(len(self.members), self._least))

    def resize(self, capacity: int) -> None:
        """Room for so many members, no fewer than there are."""
        if capacity == self.capacity:
            return
        for layer, shape in enumerate(self._shapes):
            for held in (self.keys, self.values):
                old = held[layer]
                kept = min(len(old), capacity * shape.heads)
                held[layer] = old.new_empty(capacity * shape.heads, *old.shape[1:])
                held[layer][:kept], held[layer][kept:] = old[:kept], 0
        self.capacity = capacity

    def fill(self, layer: int, first: int, count: int, keys_KDL: Tensor, values_KLD: Tensor) -> None:
        """The same tokens from the first column on, in so many places."""
        length, heads = keys_KDL.shape[-1], len(keys_KDL)
        rows = slice(first, first + count)
        self.keys[layer].unflatten(0, (-1, heads))[rows, ..., :length] = keys_KDL
        self.values[layer].unflatten(0, (-1, heads))[rows, :, :length] = values_KLD

    def read(self, layer: int, place: int, length: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of the first tokens of a row."""
        rows = slice(place * self._shapes[layer].heads, (place + 1) * self._shapes[layer].heads)
        return self.keys[layer][rows, :, :length], self.values[layer][rows, :length]

    def zero_nonfinite(self) -> None:
        """Places are used again: a NaN left behind would leak into the next row through 0 * NaN."""
        for held in (*self.keys, *self.values):
            held.nan_to_num_(0.0, posinf=0.0, neginf=0.0)

    def arrange(self, lengths: Sequence[int]) -> None:
        """Rows came, went or moved: so many tokens does each of them have, and the next one comes after them."""
        self.next_n = torch.tensor(lengths, dtype=torch.long, device=self._device)
        self._places.clear()
        self._biases.clear()

    def advance(self) -> None:
        """Every row has one token more."""
        self.next_n += 1
        for place in self._places.values():
            place += 1
        for (heads, window, _), bias in self._biases.items():
            place = self.place(heads)
            bias.view(-1).index_fill_(0, place, 0.0)
            if window is not None:
                past = self.next_n.repeat_interleave(heads) >= window
                bias.view(-1).index_fill_(0, place[past] - window, float("-inf"))

    def place(self, heads: int, size: int = 1) -> Tensor:
        """Where the next token goes: (n * K * size,) numbers into (n, K, size, W)."""
        if (heads, size) not in self._places:
            at = torch.arange(len(self.members) * heads * size, device=self._device) * self.width
            self._places[heads, size] = at + self.next_n.repeat_interleave(heads * size)
        return self._places[heads, size]

    def bias(self, heads: int, window: int | None, like: Tensor) -> Tensor:
        """(n * K, 1, W): 0 where a row looks, -inf after its next token and before its window."""
        if (heads, window, like.dtype) not in self._biases:
            hidden = hidden_columns(self.next_n, self.width, window)
            bias = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._biases[heads, window, like.dtype] = bias[:, None].repeat_interleave(heads, 0)
        return self._biases[heads, window, like.dtype]

    def _copy(self, source: Slab, places: Sequence[int], targets: Sequence[int]) -> None:
        at, to = (_rows(numbers, self._device) for numbers in (places, targets))
        for layer, shape in enumerate(self._shapes):
            for held, found, width in (
                (self.keys[layer], source.keys[layer], (slice(None), slice(source.width))),
                (self.values[layer], source.values[layer], (slice(source.width),)),
            ):
                into = held.unflatten(0, (-1, shape.heads))
                rows = found.unflatten(0, (-1, shape.heads))[at]
                into[(to, slice(None), *width)] = rows.clone() if source is self else rows


def _rows(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index for these rows; of neighbours in order a slice, which is copied several times as fast."""
    first = numbers[0]
    if list(numbers) == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers, device=device)


def hidden_columns(next_n: Tensor, width: int, window: int | None) -> Tensor:
    """(n, W): columns that a row whose next token stands here does not see."""
    columns = torch.arange(width, device=next_n.device)
    hidden = columns > next_n[:, None]
    return hidden if window is None else hidden | (columns <= next_n[:, None] - window)


# --------------------------------------------------------------------------------- beginnings of prompts


def blocks(length: int) -> Iterator[slice]:
    """The blocks of a prompt of so many tokens; the last one ends with it."""
    start, end = 0, FIRST
    while end < length:
        yield slice(start, end)
        start, end = end, end + (1 << max(LEAST_BITS, end.bit_length() - 3))
    yield slice(start, length)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is known of a prompt: so many tokens, in these blocks."""

    tokens: int = 0
    parts: tuple[Held, ...] = ()


class Prefixes:
    """Blocks by content, those that were read last; of one version of the weights."""

    def __init__(self, most_tokens: int) -> None:
        """At most so many tokens."""
        self.most_tokens, self._tokens = most_tokens, 0
        self._weights: list[int] = []
        self._held: OrderedDict[bytes, tuple[int, Held]] = OrderedDict()

    def clear(self) -> None:
        """Other weights: nothing is known."""
        self._held.clear()
        self._tokens = 0

    def expect(self, weights: list[int]) -> None:
        """How often each of the weights was written. If any was since the last time, nothing is known."""
        if weights != self._weights:
            self.clear()
        self._weights = weights

    def find(self, tokens: np.ndarray) -> Beginning:
        """The longest beginning of these tokens that is known; the last token is never in it."""
        known, parts = 0, []
        if self._held:
            for part, name in _named(tokens):
                if name not in self._held:
                    break
                self._held.move_to_end(name)
                parts.append(self._held[name][1])
                known = part.stop
        return Beginning(known, tuple(parts))

    def keep(self, tokens: np.ndarray, computed: Held, first: int) -> None:
        """Keys and values of these tokens from the first one on."""
        for part, name in _named(tokens) if self.most_tokens else ():
            if part.start >= first and name not in self._held:
                at, count = slice(part.start - first, part.stop - first), part.stop - part.start
                self._held[name] = (
                    count,
                    tuple((keys[:, at].clone(), values[:, at].clone()) for keys, values in computed),
                )
                self._tokens += count
        while self._tokens > self.most_tokens:
            self._tokens -= self._held.popitem(last=False)[1][0]


def _named(tokens: np.ndarray) -> Iterator[tuple[slice, bytes]]:
    """The whole blocks, each with a digest of what stands up to its end."""
    digest = hashlib.blake2b(digest_size=16)
    for part in blocks(len(tokens)):
        if part.stop < len(tokens):
            digest.update(tokens[part].tobytes())
            yield part, digest.digest()
