"""Context parallelism (Ulysses, Jacobs et al. 2023): several ranks compute one stream, each a part of its tokens.

Everything but attention works token by token, on a rank's own tokens. Around attention the ranks exchange: before it
each gets some of the heads for all tokens, behind it all heads for its own. So the attention mask stays whole, and
packing and shared prompts are as exact as on one rank. What was computed of trained tokens is then joined on all ranks,
each of which computes the same loss; the gradient goes back to a rank's own tokens alone, and summed over ranks it is
whole.

Legend: N tokens of the stream, n those of a rank, H query heads, K key-value heads, D head size, T trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from whet.errors import ModelError
from whet.models.attention import AttentionCall, TreeLayout

Way = Callable[[Tensor, "ContextRanks", int], Tensor]


@dataclass(frozen=True, slots=True)
class ContextRanks:
    """The ranks that share streams, and which of them this one is."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def counts(self, tokens: int) -> list[int]:
        """How many of a stream's tokens each rank has, one after another."""
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def own(self, tokens: int) -> slice:
        """This rank's part of a stream."""
        counts = self.counts(tokens)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def joined(
        self, tokens: int, stream_nD: Tensor, at_T: Tensor, read: Callable[[Tensor, Tensor], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """What `read(states, which)` says of the states at these places, each read by the rank that has it."""
        own = self.own(tokens)
        which = ((at_T >= own.start) & (at_T < own.stop)).nonzero()[:, 0]
        said = read(stream_nD[at_T[which] - own.start], which)
        return tuple(value if value is None else _Join.apply(value, which, len(at_T), self) for value in said)  # type: ignore[no-untyped-call]

    def require(self, heads: int, kv_heads: int, name: str) -> None:
        """Raise `ModelError` where the heads cannot be divided."""
        if heads % lcm(kv_heads, self.size):
            raise ModelError(
                f"{name}: machine.trainer.context is {self.size}, and {heads} heads over {kv_heads} key-value heads "
                "cannot be divided so; choose a number that divides both"
            )


@dataclass(frozen=True, slots=True)
class ContextLayout:
    """`Layout` of a stream whose tokens are spread over ranks."""

    tree: TreeLayout
    context: ContextRanks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """query (1, H, n, D), key and value (1, K, n, D) -> (1, n, H, D); key-value heads are repeated where needed."""
        ranks, kv_heads = self.context.size, key.shape[1]
        repeats = lcm(kv_heads, ranks) // kv_heads
        parts = [query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)]
        sizes = [part.shape[1] // ranks for part in parts]
        sent = torch.cat([part[0].unflatten(0, (ranks, -1)) for part in parts], 1)
        where = self.context, self.tree.tokens
        mine = _Exchange.apply(sent.flatten(0, 1), (_to_heads, _to_tokens), *where)  # type: ignore[no-untyped-call]
        if call.sinks_H is not None:
            call = replace(call, sinks_H=call.sinks_H.chunk(ranks)[self.context.rank])
        query, key, value = (part[None] for part in mine.split(sizes))
        out = self.tree.attend(query, key, value, call)
        back = _Exchange.apply(out[0].transpose(0, 1), (_to_tokens, _to_heads), *where)  # type: ignore[no-untyped-call]
        return back.transpose(0, 1)[None]  # type: ignore[no-any-return]


def _to_heads(all_heads: Tensor, context: ContextRanks, tokens: int) -> Tensor:
    """All heads of n tokens, those of each rank together -> this rank's heads of N tokens."""
    heads, size = len(all_heads) // context.size, all_heads.shape[2]
    counts = context.counts(tokens)
    got = all_heads.new_empty(heads * tokens * size)
    sent = [heads * counts[context.rank] * size] * context.size
    dist.all_to_all_single(
        got, all_heads.contiguous().view(-1), [heads * n * size for n in counts], sent, context.group
    )
    parts = got.split([heads * n * size for n in counts])
    return torch.cat([part.view(heads, n, size) for part, n in zip(parts, counts, strict=True)], 1)


def _to_tokens(my_heads: Tensor, context: ContextRanks, tokens: int) -> Tensor:
    """The way back: this rank's heads of N tokens -> all heads of its n tokens."""
    heads, size = len(my_heads), my_heads.shape[2]
    counts = context.counts(tokens)
    sent = torch.cat([part.reshape(-1) for part in my_heads.split(counts, 1)])
    own = heads * counts[context.rank] * size
    got = sent.new_empty(context.size * own)
    dist.all_to_all_single(got, sent, [own] * context.size, [heads * n * size for n in counts], context.group)
    return got.view(context.size * heads, counts[context.rank], size)


class _Exchange(torch.autograd.Function):
    """`_to_heads` or `_to_tokens`; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ways: tuple[Way, Way], context: ContextRanks, tokens: int) -> Tensor:
        ctx.back, ctx.where = ways[1], (context, tokens)
        return ways[0](tensor, context, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad, *ctx.where), None, None, None


class _Join(torch.autograd.Function):
    """What each rank knows of some trained tokens, for all of them; a rank's own get their gradient from its loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, which: Tensor, total: int, context: ContextRanks) -> Tensor:
        ctx.save_for_backward(which)
        whole = value.new_zeros(total, *value.shape[1:])
        whole[which] = value
        dist.all_reduce(whole, group=context.group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.saved_tensors[0]], None, None, None
