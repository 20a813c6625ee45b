"""The tree attention of `models.attention` by torch's flex attention: one kernel for prompts, answers and windows.

Which blocks of 128 x 128 tokens are looked at follows from the trees; inside them a token's tree, branch and position
decide, so nothing is ever as large as tokens x tokens. On a GPU the kernel is compiled at its first call. On a CPU
the same function runs uncompiled and forward only: that is how its mask is tested.

Legend: N tokens of the stream, B blocks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128


@dataclass(frozen=True, slots=True)
class Labels:
    """What decides which token attends to which: tree and branch (-1: the prefix) of each token, and its position."""

    tree_N: Tensor
    branch_N: Tensor
    position_N: Tensor

    def sees(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """flex attention's question: may the token at `query` see the one at `key`?"""
        tree_N, branch_N, position_N = self.tree_N, self.branch_N, self.position_N  # the compiler sees tensors alone

        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = position_N[query] - position_N[key]
            branch = (branch_N[key] == -1) | (branch_N[key] == branch_N[query])
            seen = (tree_N[query] == tree_N[key]) & branch & (distance >= 0)
            return seen if window is None else seen & (distance < window)

        return mask


def block_mask(
    segments: Sequence[tuple[int, int]], links: Sequence[tuple[slice, slice]], labels: Labels, window: int | None
) -> BlockMask:
    """The blocks that hold anything to see: of a segment itself up to the query, and of its prefix."""
    tokens, device = len(labels.tree_N), labels.tree_N.device
    blocks = -(-tokens // BLOCK)
    seen_BB = np.zeros((blocks, blocks), dtype=bool)
    for start, length in segments:
        first, last = start // BLOCK, (start + length - 1) // BLOCK + 1
        seen_BB[first:last, first:last] |= np.tri(last - first, dtype=bool)
    for branch, prefix in links:
        seen_BB[_blocks(branch), _blocks(prefix)] = True
    count_B = torch.from_numpy(seen_BB.sum(1)).to(device, torch.int32)
    index_BB = torch.from_numpy(np.argsort(~seen_BB, axis=1, kind="stable")).to(device, torch.int32)
    return BlockMask.from_kv_blocks(
        count_B[None, None],
        index_BB[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=labels.sees(window),
        seq_lengths=(tokens, tokens),
    )


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How scores become shares; see `attention.Call`."""

    scale: float
    softcap: float | None = None
    sinks_H: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, rule: MaskRule) -> Tensor:
    """(1, H, N, D), (1, K, N, D) twice -> (1, H, N, D)."""
    run = _compiled() if query.device.type == "cuda" else flex_attention
    options = {"score_mod": None if rule.softcap is None else _capped(rule.softcap), "block_mask": mask}
    if rule.sinks_H is None:
        out: Tensor = run(query, key, value, scale=rule.scale, enable_gqa=True, **options)
        return out
    aux = AuxRequest(lse=True)
    out, found = run(query, key, value, scale=rule.scale, enable_gqa=True, return_aux=aux, **options)
    # A sink takes its share of the softmax: exp(lse) of exp(lse) + exp(sink) is left.
    left: Tensor = torch.sigmoid(found.lse - rule.sinks_H.to(found.lse.dtype)[:, None])
    return out * left[..., None].to(out.dtype)


@lru_cache(maxsize=4)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _blocks(tokens: slice) -> slice:
    return slice(tokens.start // BLOCK, -(-tokens.stop // BLOCK))


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
