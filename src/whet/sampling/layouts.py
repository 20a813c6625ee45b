"""Attention while sampling: prompts as they come in, and one new token for every running row.

A row stands in one slab, prompt and all, or, where its prompt is shared, only with what it has written: then the
queries of all rows of a prompt are rows of one product with the prompt's keys, and the two parts are merged by their
log-sum-exp.

Each prompt is computed by itself, and each row's products have the shapes of its size class, so that nothing here
depends on who else is there.

Legend: N tokens of the stream, S rows, T rows whose prompt is shared, P prompts, R places for a prompt's rows, H query
heads, K key-value heads, G query heads of one key-value head, D head size, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whet.models.attention import AttentionCall, TreeLayout, causal, weigh
from whet.models.matmul import ROWS
from whet.sampling.kv_cache import Beginning, Slab, blocks

PART = 128
"""Columns of values that are added up in one product: longer sums are cut in other places for other lengths."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a prompt that is computed goes: its tokens in the stream, and so many places of a slab."""

    tokens: slice
    slab: Slab
    first: int
    count: int
    known: Beginning = field(default_factory=Beginning)
    """What stands before its tokens."""
    computed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Keys and values (K, L, D) of its tokens, layer by layer."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, call: AttentionCall) -> Tensor:
        """(1, H, L, D) of its tokens, and all keys and values of the prompt -> (1, L, H, D), block by block."""
        before, parts, keys, values = self.known.tokens, [], keys.contiguous(), values.contiguous()
        for part in blocks(keys.shape[2]):
            if part.start >= before:
                asked = query[:, :, part.start - before : part.stop - before].contiguous()
                parts.append(causal(asked, keys[:, :, : part.stop], values[:, :, : part.stop], scale=call.scale))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class Prefill:
    """Computes prompts in one stream, and keeps each one's keys and values. What stands after them is padding."""

    entries: Sequence[Entry]
    whole: TreeLayout
    """All of them at once, for devices and layers on which a prompt is not computed by itself."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """`Layout`."""
        tokens = self.entries[-1].tokens.stop
        alone = query.device.type == "cpu" and call.window is None and call.usual
        out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        for entry in self.entries:
            own = key[0, :, entry.tokens], value[0, :, entry.tokens]
            entry.computed.append(own)
            layers = [part[call.layer] for part in entry.known.parts]
            keys_KLD, values_KLD = (torch.cat(all_, 1) for all_ in zip(*layers, own, strict=True)) if layers else own
            entry.slab.fill(call.layer, entry.first, entry.count, keys_KLD.transpose(1, 2), values_KLD)
            if alone:
                out[:, entry.tokens] = entry.attend(query[:, :, entry.tokens], keys_KLD[None], values_KLD[None], call)
        if not alone:
            query, key, value = (t[:, :, :tokens] for t in (query, key, value))
            out[:, :tokens] = self.whole.attend(query, key, value, call)
        return out


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows arranged by their prompts, P x R places of one slab of prompts; a place without a row repeats another one.

    R is such that the products have as many rows as `models.matmul` wants.
    """

    slab: Slab
    row_PR: Tensor
    """Numbers among the T rows."""
    shape: tuple[int, int]

    @classmethod
    def of(cls, slab: Slab, rows_P: Sequence[Sequence[int]], device: torch.device) -> Shared:
        """From the rows of each prompt, in the order of the slab."""
        R = -(-max(1, *map(len, rows_P)) // ROWS) * ROWS
        row_PR = [row for rows in rows_P for row in (*rows, *[rows[-1] if rows else 0] * (R - len(rows)))]
        return cls(slab, torch.tensor(row_PR, device=device), (len(rows_P), R))

    def look(self, query_TKGD: Tensor, call: AttentionCall) -> Tensor:
        """(P * R, K, G, D + 2): what each place sees of its prompt, with the largest score and share."""
        P, R = self.shape
        _, K, G, D = query_TKGD.shape
        asked = query_TKGD.index_select(0, self.row_PR).view(P, R, K, G, D).transpose(1, 2).reshape(P * K, R * G, D)
        seen = _look(asked, self.slab, call, marks=True)
        return seen.view(P, K, R, G, -1).transpose(1, 2).reshape(P * R, K, G, -1)


@dataclass(slots=True)
class DecodeBatch:
    """The running rows: those with their prompt in front, slab by slab, and then those whose prompt is shared."""

    slabs: Sequence[Slab]
    alone: int
    """How many of the slabs hold rows with their prompt in front."""
    prompts: Sequence[Shared]
    place_T: Tensor
    """Of each row whose prompt is shared, among the places of all `prompts`."""
    longest: int
    """Tokens of the longest row once this step's are in."""

    def advance(self) -> None:
        """Every row has one token more."""
        self.longest += 1
        for slab in self.slabs:
            slab.advance()


@dataclass(frozen=True, slots=True)
class Decode:
    """One new token for each running row: writes its key and value, and attends to what the row sees."""

    batch: DecodeBatch

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """`Layout`. Tokens beyond the running rows are padding."""
        N, K, D = query.shape[2], key.shape[1], key.shape[3]
        query = query[0].transpose(0, 1).reshape(N * K, -1, D)
        keys, values = key[0].transpose(0, 1).reshape(-1), value[0].transpose(0, 1).reshape(N * K, -1)
        at, parts = 0, []
        for number, slab in enumerate(self.batch.slabs):
            rows = slice(at, at + len(slab.members) * K)
            slab.keys[call.layer].view(-1).scatter_(0, slab.place(K, D), keys[rows.start * D : rows.stop * D])
            slab.values[call.layer].flatten(0, 1).index_copy_(0, slab.place(K), values[rows])
            parts.append(_look(query[rows], slab, call, marks=number >= self.batch.alone))
            at = rows.stop
        alone = self.batch.alone
        if own := parts[alone:]:
            own_TKGD = torch.cat(own)
            asked = query[at - len(own_TKGD) : at].unflatten(0, (-1, K))
            seen = torch.cat([shared.look(asked, call) for shared in self.batch.prompts])
            parts[alone:] = [merge(own_TKGD, seen.index_select(0, self.batch.place_T).flatten(0, 1))]
        if at < N * K:
            parts.append(parts[0].new_zeros(N * K - at, *parts[0].shape[1:]))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out.view(1, N, -1, out.shape[2])


def _look(query: Tensor, slab: Slab, call: AttentionCall, *, marks: bool) -> Tensor:
    """(n * K, M, D) -> what they see of a slab; with `marks`, the largest score and the largest share beside it."""
    keys, values = slab.keys[call.layer][: len(query)], slab.values[call.layer][: len(query)]
    bias = slab.bias(len(query) // len(slab.members), call.window, query)
    if not marks:
        return attend_rows(query, keys, values, bias, call)
    assert call.window is None and call.usual, "windows, softcaps and sinks cover prompt and answer at once"
    scores = torch.baddbmm(bias, query, keys, alpha=call.scale)
    exact = softmax(scores)
    seen = _sum(exact.to(values.dtype), values).to(exact.dtype)
    return torch.cat((seen, scores.amax(-1, keepdim=True), exact.amax(-1, keepdim=True)), -1)


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, call: AttentionCall) -> Tensor:
    """(n * K, G, D), (n * K, D, W), (n * K, W, D) and the bias that hides keys -> (n * K, G, D)."""
    if call.usual:
        return _sum(softmax(torch.baddbmm(bias, query, keys, alpha=call.scale)).to(values.dtype), values)
    sinks = None
    if call.sinks_H is not None:
        of_heads = call.sinks_H.view(-1, query.shape[1], 1)
        sinks = of_heads.repeat(len(query) // len(of_heads), 1, 1)
    return torch.bmm(weigh(torch.bmm(query, keys) * call.scale, call, bias, sinks), values)


def _sum(share: Tensor, values: Tensor) -> Tensor:
    """share @ values, in parts of one length."""
    seen = torch.bmm(share[..., :PART], values[:, :PART])
    for first in range(PART, values.shape[1], PART):
        part = slice(first, first + PART)
        seen.baddbmm_(share[..., part], values[:, part])
    return seen


def merge(left: Tensor, right: Tensor) -> Tensor:
    """Two parts of one attention, (..., D + 2) each with its largest score and share, as one (..., D).

    The largest share is one over the sum of a part's exponentials, relative to its largest score.
    """
    top = torch.maximum(left[..., -2], right[..., -2])
    sums = [((part[..., -2] - top).exp_() / part[..., -1])[..., None] for part in (left, right)]
    return (left[..., :-2] * sums[0] + right[..., :-2] * sums[1]) / (sums[0] + sums[1])


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis, in float32 or wider."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
