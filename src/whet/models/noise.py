"""NEFTune (Jain et al. 2023, 2310.05914): uniform noise on the embeddings of what a model is trained on.

Legend: N tokens of a packed stream, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whet.models.attention import TreeLayout


def row_lengths(layout: TreeLayout) -> Tensor:
    """(N,): tokens of the row that each token belongs to, prompt included; of a shared prompt the longest row's."""
    pieces = []
    for tree in layout.trees:
        pieces += [torch.full((tree.prefix,), tree.prefix + max(tree.branches, default=0))]
        pieces += [torch.full((length,), tree.prefix + length) for length in tree.branches]
    return torch.cat(pieces).to(layout.device)


@contextmanager
def noisy(embedding: nn.Module, lengths_N: Tensor, alpha: float) -> Iterator[None]:
    """Within the block every embedding has noise in +-alpha / sqrt(row length x D), from torch's global generator."""

    def add(_: nn.Module, __: Any, embedded_1ND: Tensor) -> Tensor:
        size_N = alpha / (lengths_N * embedded_1ND.shape[-1]).to(embedded_1ND.dtype).sqrt()
        return embedded_1ND + torch.empty_like(embedded_1ND).uniform_(-1, 1) * size_N[:, None]

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
