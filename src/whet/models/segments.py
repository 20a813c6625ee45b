"""The segments of a packed stream in the shapes in which an attention kernel takes them.

Long ones are read where they are, neighbours of one length together; short ones are padded together, so that a call
of the kernel has enough to do.

Legend: N tokens of the stream, H heads, S segments, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

BUCKET_WASTE = 1.25
"""Segments are padded together while the padded size stays below this multiple of their tokens."""
ALONE = 64
"""Tokens from which a segment is worth a call of its own, without padding and copies."""
FEW_THREADS = 2
"""With more threads such calls leave some idle: the kernel's backward pass shares out sequences and heads only."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of similar length, padded on the right to one shape (S, L)."""

    index_SL: Tensor
    """Where each padded place is read from in the stream; padding reads its segment's first token."""
    slot_M: Tensor
    """The places that are no padding, as numbers into S * L. Legend: M tokens of the bucket."""
    token_M: Tensor
    """The stream's tokens at those places."""

    def take(self, tensor_N: Tensor) -> Tensor:
        """(N, H, ...) -> (S, H, L, ...)."""
        taken = tensor_N.index_select(0, self.index_SL.flatten())
        return taken.view(*self.index_SL.shape, *tensor_N.shape[1:]).transpose(1, 2)

    def put(self, into_N: Tensor, padded: Tensor) -> None:
        """(S, H, L, ...) -> its tokens' places in (N, H, ...)."""
        into_N.index_copy_(0, self.token_M, padded.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_M))


@dataclass(frozen=True, slots=True)
class Stretch:
    """S neighbouring segments of L tokens each, read and written where they are."""

    start: int
    S: int
    L: int

    def take(self, tensor_N: Tensor) -> Tensor:
        """(N, H, ...) -> (S, H, L, ...)."""
        return self._of(tensor_N).transpose(1, 2)

    def put(self, into_N: Tensor, found: Tensor) -> None:
        """(S, H, L, ...) -> its tokens' places in (N, H, ...)."""
        self._of(into_N).copy_(found.transpose(1, 2))

    @property
    def end(self) -> int:
        """The first token behind them."""
        return self.start + self.S * self.L

    def _of(self, tensor_N: Tensor) -> Tensor:
        return tensor_N[self.start : self.end].view(self.S, self.L, *tensor_N.shape[1:])


def parts_of(segments: Sequence[tuple[int, int]], device: torch.device) -> list[Stretch | Bucket]:
    """All segments (start, length), each in one part."""
    stretches: list[Stretch] = []
    short: list[tuple[int, int]] = []
    for start, length in segments:
        if length < ALONE or torch.get_num_threads() > FEW_THREADS:
            short.append((start, length))
        elif stretches and (stretches[-1].L, stretches[-1].end) == (length, start):
            stretches[-1] = replace(stretches[-1], S=stretches[-1].S + 1)
        else:
            stretches.append(Stretch(start, 1, length))
    return [*stretches, *(_bucket(group, device) for group in _alike(short))]


def _alike(segments: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Groups of similar length, the longest first."""
    groups: list[list[tuple[int, int]]] = []
    used = 0
    for start, length in sorted(segments, key=lambda segment: -segment[1]):
        if groups and (len(groups[-1]) + 1) * groups[-1][0][1] <= BUCKET_WASTE * (used + length):
            groups[-1].append((start, length))
            used += length
        else:
            groups.append([(start, length)])
            used = length
    return groups


def _bucket(group: Sequence[tuple[int, int]], device: torch.device) -> Bucket:
    start_S, length_S = np.array(group).T
    offset_L = np.arange(length_S.max())
    valid_SL = offset_L < length_S[:, None]
    index_SL = np.where(valid_SL, start_S[:, None] + offset_L, start_S[:, None])
    slot_M = valid_SL.ravel().nonzero()[0]
    token_M = index_SL.ravel()[slot_M]
    return Bucket(*(torch.from_numpy(numbers).to(device) for numbers in (index_SL, slot_M, token_M)))
