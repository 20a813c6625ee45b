"""Attention over packed sequences that may share a prompt, under any Hugging Face decoder.

A packed stream holds *trees*: a prefix (the prompt, possibly empty) followed by its branches (the answers). A token
sees the prefix and its own branch up to itself; nothing else. So a prompt is computed once for all its answers,
forward and backward, and packing cannot leak from one row to another.

The models call `attend` through transformers' attention interface under the name `whet`, with the layout among
their keyword arguments; no modelling code is replaced. Three backends compute the same function:

- `flash`: causal self-attention of every segment and full attention of the branches to their prefix, merged by
  their log-sum-exp. Exact, and needs no mask. The backward pass gives each part the *merged* output and
  log-sum-exp, from which the flash kernels derive the right gradients. Windows shorter than a row, soft-capped scores
  (Gemma 2) and attention sinks (gpt-oss) go through `masked` on a CPU.
- `flex`: torch's flex attention over the blocks that hold anything to see (`models.flex`), for GPUs. It is compared
  with the next one when a model is loaded, forward and backward, and not used where it differs.
- `masked`: one dense mask over the stream. Slow, and plainly right: the reference in tests, and the path for
  devices and models that the others cannot serve.

Legend: N tokens of the stream, H query heads, K key-value heads, D head size, S segments, L longest segment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from whet.errors import ModelError
from whet.models import flex
from whet.models.flex import Labels, block_mask
from whet.models.segments import Bucket, Stretch, parts_of

ATTENTION = "whet"
"""The name of `attend` among transformers' attention functions."""
FAR = 1e30
"""Log-sum-exp of padding queries: their probabilities vanish in the backward pass."""
AGREEMENT = 2e-2
"""Largest difference from `masked` that reduced-precision products make; a wrong mask is off by far more."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a model layer says when it asks for attention."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None = None
    """Scores become softcap tanh(score / softcap) (Gemma 2)."""
    sinks_H: Tensor | None = None
    """A score of each head that takes its share of the softmax and gives nothing (gpt-oss)."""

    @property
    def usual(self) -> bool:
        """Whether it is a plain softmax of scores."""
        return self.softcap is None and self.sinks_H is None


class Layout(Protocol):
    """Which tokens attend to which in one forward pass."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """query (1, H, N, D), key and value (1, K, N, D) -> (1, N, H, D)."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls. Refuses what it does not compute, by name."""
    name = type(module).__name__
    if layout is None:
        raise ModelError(
            f"{name} was called without a layout: outside whet's forward, or by layers that drop keyword arguments"
        )
    if dropout:
        raise ModelError(f"{name} uses attention dropout, which whet's attention does not compute")
    if torch.is_autocast_enabled(query.device.type):  # norms and rotary embeddings leave float32 behind
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    call = AttentionCall(layer=module.layer_idx, scale=scaling, window=sliding_window, softcap=softcap, sinks_H=s_aux)
    size = value.shape[-1]
    if size < key.shape[-1]:  # latent attention (DeepSeek) has values of a size of their own
        value = F.pad(value, (0, key.shape[-1] - size))
    return layout.attend(query, key, value, call)[..., :size], None


def weigh(score: Tensor, call: AttentionCall, bias: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Scores (..., keys) as shares of a softmax, summed in float32 or wider; `bias` hides keys with -inf.

    `sinks`: the call's, in a shape that broadcasts to (..., 1).
    """
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    if bias is not None:
        score = score + bias
    wide = torch.promote_types(score.dtype, torch.float32)
    if sinks is None:
        return score.softmax(-1, dtype=wide).to(score.dtype)
    sinks = sinks.to(score.dtype).expand(*score.shape[:-1], 1)
    return torch.cat((score, sinks), -1).softmax(-1, dtype=wide)[..., :-1].to(score.dtype)


@dataclass(frozen=True, slots=True)
class Tree:
    """A prefix and the branches that continue it, as token counts. Without a prefix the branches are independent."""

    prefix: int
    branches: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of the tree in the stream."""
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class TreeLayout:
    """Which tokens attend to which in a stream of trees, whose segments stand in the order of `trees`."""

    trees: tuple[Tree, ...]
    device: torch.device
    backend: str = "flash"

    @property
    def tokens(self) -> int:
        """N."""
        return sum(tree.size for tree in self.trees)

    @cached_property
    def positions_N(self) -> Tensor:
        """Position of each token in its own sequence: branches continue where their prefix ends."""
        pieces = []
        for tree in self.trees:
            pieces.append(np.arange(tree.prefix))
            pieces += [np.arange(tree.prefix, tree.prefix + length) for length in tree.branches]
        return torch.from_numpy(np.concatenate(pieces)).to(self.device)

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(start, length) of every non-empty prefix and branch."""
        found, at = [], 0
        for tree in self.trees:
            for length in (tree.prefix, *tree.branches):
                if length:
                    found.append((at, length))
                at += length
        return found

    @cached_property
    def links(self) -> list[tuple[slice, slice]]:
        """(tokens of the branches, tokens of their prefix) for each tree that has both."""
        found, at = [], 0
        for tree in self.trees:
            middle, end = at + tree.prefix, at + tree.size
            if tree.prefix and end > middle:
                found.append((slice(middle, end), slice(at, middle)))
            at = end
        return found

    @cached_property
    def parts(self) -> list[Stretch | Bucket]:
        """All segments, each in one part."""
        return parts_of(self.segments, self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prefix and its longest branch."""
        return max(tree.prefix + max(tree.branches, default=0) for tree in self.trees)

    @cached_property
    def labels(self) -> Labels:
        """Tree, branch (-1: the prefix) and position of each token."""
        tree_N, branch_N = [], []
        for number, tree in enumerate(self.trees):
            tree_N += [number] * tree.size
            branch_N += [-1] * tree.prefix
            for branch, length in enumerate(tree.branches):
                branch_N += [branch] * length
        return Labels(
            torch.tensor(tree_N, device=self.device), torch.tensor(branch_N, device=self.device), self.positions_N
        )

    def mask_NN(self, window: int | None = None) -> Tensor:
        """mask[q, k]: may token q see token k?"""
        at_N = torch.arange(self.tokens, device=self.device)
        return self.labels.sees(window)(at_N, at_N, at_N[:, None], at_N[None, :])

    @cached_property
    def block_masks(self) -> dict[int | None, BlockMask]:
        """Those that were asked for, by window: made once for all layers."""
        return {}

    def block_mask(self, window: int | None) -> BlockMask:
        """flex attention's mask."""
        if window not in self.block_masks:
            self.block_masks[window] = block_mask(self.segments, self.links, self.labels, window)
        return self.block_masks[window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Attention of every token to its prefix and its own branch."""
        window = call.window if call.window is not None and call.window < self.longest else None
        if self.backend == "flash" and window is None and call.usual and query.device.type == "cpu":
            return _FlashTree.apply(query, key, value, self, call.scale)  # type: ignore[no-any-return, no-untyped-call]
        if self.backend == "flex":
            rule = flex.MaskRule(scale=call.scale, softcap=call.softcap, sinks_H=call.sinks_H)
            return flex.attend(query, key, value, self.block_mask(window), rule).transpose(1, 2)
        mask = self.mask_NN(window)
        if not call.usual:
            return _masked(query, key, value, mask, call).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale, enable_gqa=True)
        return out.transpose(1, 2)


@lru_cache(maxsize=4)
def pick_backend(device: torch.device) -> str:
    """The backend for training on a device: `flash` on a CPU; on a GPU `flex` if it agrees with `masked` there."""
    if device.type == "cpu":
        return "flash"
    try:
        gap = largest_gap("flex", device)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything
        logging.getLogger(__name__).warning("flex attention does not run here (%s): using a dense mask, slowly", error)
        return "masked"
    if not gap < AGREEMENT:
        logging.getLogger(__name__).warning("flex attention is off by %.2g here: using a dense mask, slowly", gap)
        return "masked"
    return "flex"


def largest_gap(backend: str, device: torch.device, *, backward: bool = True) -> float:
    """How far a backend is from `masked` on three small trees, in outputs and gradients that are of order 1."""
    trees = (Tree(150, (40, 3, 90)), Tree(0, (130,)), Tree(20, (1, 60)))
    results = []
    for name in (backend, "masked"):
        layout, draw = TreeLayout(trees, device, name), torch.Generator().manual_seed(0)
        shapes = ((1, heads, layout.tokens, 64) for heads in (4, 2, 2))
        query, key, value = (torch.randn(shape, generator=draw).to(device).requires_grad_(backward) for shape in shapes)
        found = []
        sinks_H = torch.linspace(-1, 2, 4, device=device)
        for window, softcap, sinks in ((None, None, None), (30, None, None), (30, 2.0, None), (None, None, sinks_H)):
            call = AttentionCall(layer=0, scale=0.125, window=window, softcap=softcap, sinks_H=sinks)
            out = layout.attend(query, key, value, call)
            upstream = torch.arange(out.numel(), device=device).view_as(out).sin()
            found += [out.detach(), *(torch.autograd.grad(out, (query, key, value), upstream) if backward else ())]
        results.append(found)
    return max(float((left - right).abs().max()) for left, right in zip(*results, strict=True))


def _masked(query: Tensor, key: Tensor, value: Tensor, mask_NN: Tensor, call: AttentionCall) -> Tensor:
    """(1, H, N, D) of attention with a softcap or sinks, by the dense mask."""
    K = key.shape[1]
    grouped = query.unflatten(1, (K, -1))  # (1, K, G, N, D): the G query heads of each key-value head
    score = grouped @ key[:, :, None].mT * call.scale
    bias = torch.zeros_like(mask_NN, dtype=score.dtype).masked_fill_(~mask_NN, float("-inf"))
    sinks = None if call.sinks_H is None else call.sinks_H.view(K, -1, 1, 1)
    return (weigh(score, call, bias, sinks) @ value[:, :, None]).flatten(1, 2)


class _FlashTree(torch.autograd.Function):
    """Segments by the flash kernel, merged with the prefix part by log-sum-exp. Inside, tensors are (N, H, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> Tensor:
        query, key, value = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        out_NHD = torch.empty_like(query)
        lse_NH = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in layout.parts:
            out, lse = _flash(part.take(query), part.take(key), part.take(value), causal=True, scale=scale)
            part.put(out_NHD, out)
            part.put(lse_NH, lse)
        for branch, prefix in layout.links:
            inputs = (_one(query[branch]), _one(key[prefix]), _one(value[prefix]))
            seen, seen_lse = _flash(*inputs, causal=False, scale=scale)
            own_lse, seen_lse = lse_NH[branch], seen_lse[0].T
            total = torch.logaddexp(own_lse, seen_lse)
            own_share, seen_share = (own_lse - total).exp()[..., None], (seen_lse - total).exp()[..., None]
            out_NHD[branch] = (out_NHD[branch] * own_share + seen[0].transpose(0, 1) * seen_share).to(query.dtype)
            lse_NH[branch] = total
        ctx.save_for_backward(query, key, value, out_NHD, lse_NH)
        ctx.layout, ctx.scale = layout, scale
        return out_NHD[None]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: unpacking may recompute a checkpointed layer
        query, key, value, out_NHD, lse_NH = saved
        grad_NHD = grad_out[0].contiguous()
        grads = [torch.empty_like(t) for t in (query, key, value)]  # every token is in exactly one part
        for part in ctx.layout.parts:
            lse_SHL, grad_SHLD = part.take(lse_NH), part.take(grad_NHD)
            if isinstance(part, Bucket) and len(part.slot_M) < part.index_SL.numel():
                padding = torch.ones_like(part.index_SL, dtype=torch.bool)
                padding.view(-1)[part.slot_M] = False
                # A padding query has no gradient and, by its log-sum-exp, no probabilities.
                lse_SHL = lse_SHL.masked_fill(padding[:, None], FAR)
                grad_SHLD = grad_SHLD.masked_fill(padding[:, None, :, None], 0)
            inputs = [grad_SHLD, *(part.take(t) for t in (query, key, value, out_NHD)), lse_SHL]
            found = _flash_backward(inputs, causal=True, scale=ctx.scale)
            for grad, own in zip(grads, found, strict=True):
                part.put(grad, own)
        for branch, prefix in ctx.layout.links:
            where = (branch, branch, prefix, prefix, branch, branch)
            inputs = [_one(t[w]) for t, w in zip((grad_NHD, *saved), where, strict=True)]
            found = _flash_backward(inputs, causal=False, scale=ctx.scale)
            for grad, more, tokens in zip(grads, found, (branch, prefix, prefix), strict=True):
                grad[tokens] += more[0].transpose(0, 1)
        return (*(grad.transpose(0, 1)[None] for grad in grads), None, None)


def causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """The last N tokens of one sequence of L, on a CPU: (1, H, N, D) and twice (1, K, L, D) -> (1, N, H, D)."""
    N, L = query.shape[2], key.shape[2]
    mask = None if N == L else query.new_full((N, L), float("-inf")).triu_(L - N + 1)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = attend(query, key, value, 0.0, N == L, attn_mask=mask, scale=scale)[0]
    return out.transpose(1, 2)


def _one(tensor_NH: Tensor) -> Tensor:
    """(N, H, ...) -> (1, H, N, ...): a stretch of the stream as a batch of one."""
    return tensor_NH.transpose(0, 1)[None]


def _flash(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(inputs: Sequence[Tensor], *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `inputs` are the output's gradient, query, key, value, output, log-sum-exp."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *inputs, 0.0, causal, scale=scale
    )
    return grads
