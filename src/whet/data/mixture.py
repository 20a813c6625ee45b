"""A weighted mixture of data sets in one stage: which example comes when.

An epoch has as many samples as all sets have examples. Without weights it is all of them, shuffled together. With
weights each set has its share of the samples: a small set that weighs much is gone through several times in an epoch,
and a large one that weighs little goes on in the next epoch where it stopped. No set repeats an example before it has
given all of them.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from whet.data.base import Lazy
from whet.records import seed_of

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Blend:
    """Sets of so many examples, and their weights; none: every example counts the same."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()

    @property
    def total(self) -> int:
        """Samples of an epoch."""
        return sum(self.sizes)

    @property
    def samples(self) -> tuple[int, ...]:
        """Samples of each set in an epoch: its share of all, rounded so that they add up."""
        if not self.weights:
            return self.sizes
        ends = [round(self.total * share / sum(self.weights)) for share in accumulate(self.weights, initial=0.0)]
        return tuple(end - start for start, end in pairwise(ends))

    def chosen(self, index: int, epoch: int, seed: int) -> list[int]:
        """Which examples of a set an epoch has: the set's own shuffled rounds, one after another."""
        size, count = self.sizes[index], self.samples[index]
        places = [divmod(place, size) for place in range(epoch * count, (epoch + 1) * count)]
        rounds = {number: shuffled(size, seed_of(seed, "set", index, number)) for number in {p for p, _ in places}}
        return [rounds[number][place] for number, place in places]

    def order(self, epoch: int, seed: int) -> list[int]:
        """The samples of an epoch, counted through all sets laid end to end."""
        if not self.weights:
            return shuffled(self.total, seed_of(seed, "epoch", epoch))
        first = list(accumulate(self.sizes, initial=0))
        places = [first[i] + place for i in range(len(self.sizes)) for place in self.chosen(i, epoch, seed)]
        random.Random(seed_of(seed, "epoch", epoch)).shuffle(places)
        return places

    def describe(self, names: Sequence[str], lengths: Sequence[npt.NDArray[np.int64]], seed: int) -> str:
        """`mixture, in the first epoch: a.jsonl 60.0% of 900 samples (1.2 rounds), 71.4% of the tokens; ...`.

        `lengths`: tokens of the examples of each set.
        """
        chosen = [self.chosen(i, 0, seed) if self.weights else list(range(size)) for i, size in enumerate(self.sizes)]
        tokens = [int(each[places].sum()) for each, places in zip(lengths, chosen, strict=True)]
        parts = [
            f"{name} {len(places) / self.total:.1%} of {self.total:,} samples ({len(places) / size:.2g} rounds), "
            f"{count / sum(tokens):.1%} of the tokens"
            for name, places, size, count in zip(names, chosen, self.sizes, tokens, strict=True)
        ]
        return f"mixture, in the first epoch: {'; '.join(parts)}"


def end_to_end(parts: Sequence[Sequence[Item]]) -> Sequence[Item]:
    """The parts as one sequence; items are read when they are asked for."""
    if len(parts) == 1:
        return parts[0]
    first = list(accumulate((len(part) for part in parts), initial=0))

    def item(index: int) -> Item:
        part = bisect_right(first, index) - 1
        return parts[part][index - first[part]]

    return Lazy(first[-1], item)


def shuffled(size: int, seed: int) -> list[int]:
    """The numbers below `size` in an order of this seed."""
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


@lru_cache(maxsize=2)
def epoch_order(blend: Blend, epoch: int, seed: int) -> list[int]:
    """`blend.order`, kept, since every step of an epoch asks for it."""
    return blend.order(epoch, seed)
