"""Beginnings of prompts: keys and values of blocks that were computed before, by their content.

A prompt is computed in blocks that begin and end at fixed positions, each with the keys and values before it. So a
block has the same bits whatever follows it, and whether it is read from here or computed again shows in no answer: it
may be forgotten at any time. That is what an episode of several turns reads of its earlier ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

FIRST = 64
"""Tokens of the first block."""
LEAST_BITS = 4
"""A block has at least 16 tokens, and an eighth of the power of two below its beginning."""

Held = tuple[tuple[Tensor, Tensor], ...]
"""Of each layer, keys and values (K, L, D) of some tokens."""


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
