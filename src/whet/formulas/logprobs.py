"""Log-probabilities of given tokens, in chunks that never hold tokens x vocabulary.

Two ways to the same numbers. Where the head is a plain linear map (`Linear`), the whole thing is one function with
its own backward pass: one buffer serves all chunks, the gradient of the weights is added up in place, and logits few
enough to keep are not computed twice. Any other head (one with an adapter, a quantised one) is a callable that
autograd goes through, chunk by chunk.

Legend: T tokens, J targets of each token, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Most logits held at once, by device (64 and 256 MiB in float32)."""
CACHED_ELEMENTS = 2**21
"""Logits that stay in a CPU's cache while they are worked on."""
LEAST_ROWS = 128
"""Rows below which the products of a large vocabulary get slow, whatever the cache holds."""
WIDE = 256
"""Hidden size from which a product that is faster but makes a tensor of its own beats one that fills the buffer: that
one more pass over the logits is little beside so many multiplications for each of them."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""(N, I), (O, I) -> (N, O): x W^T."""


@dataclass(frozen=True, slots=True)
class Linear:
    """An output head that is a plain linear map."""

    weight_VD: Tensor
    bias_V: Tensor | None
    multiply: Multiply = F.linear
    """What multiplies; torch's own, or what is faster on this machine."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What becomes of the head's products: z = cap tanh(scale x / cap), or scale x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product_TV: Tensor) -> Tensor:
        """Logits (T, V) of the head's products."""
        scaled_TV = product_TV if self.scale == 1 else product_TV * self.scale
        return scaled_TV if self.cap is None else self.cap * torch.tanh(scaled_TV / self.cap)


def token_logp(logits_TV: Tensor, target_T: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[target], computed in float32 or wider.

    Of several targets for each token, (T, J), so many.
    """
    logits_TV = _widen(logits_TV) / temperature
    if target_T.ndim == 2:
        return logits_TV.gather(-1, target_T) - logits_TV.logsumexp(-1, keepdim=True)
    return logits_TV.gather(-1, target_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)


def entropy(logits_TV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum p log p of softmax(logits / temperature), in nats, computed in float32 or wider."""
    logp_TV = (_widen(logits_TV) / temperature).log_softmax(-1)
    return -(logp_TV.exp() * logp_TV).sum(-1)


def chunked_logp(
    hidden_TD: Tensor,
    target_T: Tensor,
    head: Linear | Callable[[Tensor], Tensor],
    *,
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(logp_T, entropy_T or None) of `head(hidden)`; the logits of one chunk at a time, recomputed in backward.

    Where each token has J targets, (T, J), so many log-probabilities come back.

    The entropy is a measurement without gradient, unless `entropy_gradient` makes it part of a loss. The result
    does not depend on `chunk_elements` (None: `CHUNK_ELEMENTS`). Under autocast the products are computed in its
    precision, sums in float32.
    """
    device = hidden_TD.device.type
    chunk_elements = chunk_elements or CHUNK_ELEMENTS[device]
    if isinstance(head, Linear):
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight_VD.dtype
        asked = _Asked(compute, temperature, with_entropy, entropy_gradient, chunk_elements, head.multiply)
        target_TJ = target_T if target_T.ndim == 2 else target_T[:, None]
        logp_TJ, entropy_T = _LinearLogp.apply(hidden_TD, head.weight_VD, head.bias_V, target_TJ, asked)  # type: ignore[no-untyped-call]
        return logp_TJ.view_as(target_T), entropy_T

    def one_chunk(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        seen = logits if entropy_gradient else logits.detach()
        measured = entropy(seen, temperature=temperature) if with_entropy else logits.new_zeros(0)
        return token_logp(logits, target, temperature=temperature), measured

    size = max(1, chunk_elements // vocabulary)
    pieces = list(zip(torch.split(hidden_TD, size), torch.split(target_T, size), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        results = [one_chunk(*piece) for piece in pieces]
    else:
        results = [checkpoint(one_chunk, *piece, use_reentrant=False) for piece in pieces]
    logp_T = torch.cat([logp for logp, _ in results])
    return logp_T, torch.cat([measured for _, measured in results]) if with_entropy else None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a linear head is to compute, and how."""

    compute: torch.dtype
    """Precision of the products."""
    temperature: float
    with_entropy: bool
    entropy_gradient: bool
    chunk_elements: int
    multiply: Multiply

    def slices(self, hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
        """The rows that are worked on at a time."""
        T, V = len(hidden_TD), len(weight_VD)
        rows = max(1, self.chunk_elements // V)
        if hidden_TD.device.type == "cpu":
            rows = min(rows, max(LEAST_ROWS, CACHED_ELEMENTS // V))
        return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


class _LinearLogp(torch.autograd.Function):
    """Log-probabilities and entropies under a linear head; z are the logits over the temperature.

    With p = softmax(z), H its entropy, and g and h the gradients of log p[target] and of H:
    dz = sum over targets of g (1[target] - p) - h p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_TJ: Tensor, asked: _Asked
    ) -> tuple[Tensor, Tensor | None]:
        T, V = len(hidden_TD), len(weight_VD)
        wide = torch.promote_types(asked.compute, torch.float32)
        slices = asked.slices(hidden_TD, weight_VD)
        keep = asked.chunk_elements >= T * V and any(ctx.needs_input_grad)
        rows = slices[0].stop if slices else 0
        buffer_TV, p_TV = (hidden_TD.new_empty((size, V), dtype=wide) for size in (rows, 0 if keep else rows))
        kept: list[Tensor] = []  # in pieces that the C allocator keeps as well, which it does not above 32 MiB
        logp_TJ = hidden_TD.new_empty(target_TJ.shape, dtype=wide)
        top_T, total_T = (hidden_TD.new_empty(T, dtype=wide) for _ in range(2))
        entropy_T = torch.empty_like(top_T) if asked.with_entropy else None
        for part in slices:
            z = _logits(hidden_TD[part], weight_VD, bias_V, asked, buffer_TV)
            top = z.amax(-1, keepdim=True)
            p = (z - top if keep else torch.sub(z, top, out=p_TV[: len(z)])).exp_()
            if keep:
                kept.append(p)
            top_T[part], total_T[part] = top[:, 0], p.sum(-1)
            lse = total_T[part].log() + top_T[part]
            logp_TJ[part] = z.gather(-1, target_TJ[part]) - lse[:, None]
            if entropy_T is not None:
                entropy_T[part] = lse - z.mul_(p).sum(-1) / total_T[part]
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_TJ, top_T, total_T, entropy_T)
        ctx.asked, ctx.kept = asked, kept
        ctx.set_materialize_grads(False)
        if entropy_T is not None and not asked.entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        return logp_TJ, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_TJ: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_TJ, top_T, total_T, entropy_T = ctx.saved_tensors
        asked, slices = ctx.asked, ctx.asked.slices(hidden_TD, weight_VD)
        kept, ctx.kept = ctx.kept, []  # they are overwritten: a second backward pass computes the logits again
        buffer_TV = top_T.new_empty((slices[0].stop if slices and not kept else 0, len(weight_VD)))
        wanted = zip((hidden_TD, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        grads = [torch.zeros_like(given) if needed else None for given, needed in wanted]
        grad_TJ = top_T.new_zeros(target_TJ.shape) if grad_TJ is None else grad_TJ
        for number, part in enumerate(slices):
            share = -grad_TJ[part].sum(-1, keepdim=True)
            if kept:
                p = kept[number]
            else:
                p = _logits(hidden_TD[part], weight_VD, bias_V, asked, buffer_TV).sub_(top_T[part, None]).exp_()
            if grad_entropy_T is None:
                dz = p.mul_(share / total_T[part, None])
            else:
                steep, p = grad_entropy_T[part, None], p.div_(total_T[part, None])
                dz = torch.xlogy(p, p).mul_(-steep).addcmul_(p, share - steep * entropy_T[part, None])
            dz.scatter_add_(1, target_TJ[part], grad_TJ[part])
            _spread(dz, part, hidden_TD, weight_VD, asked, grads)
        return (*grads, None, None)


def _logits(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, asked: _Asked, buffer_TV: Tensor) -> Tensor:
    """(hidden weight^T + bias) / temperature; in the buffer, or in a tensor of its own."""
    hidden_TD, weight_VD = hidden_TD.to(asked.compute), weight_VD.to(asked.compute)
    if buffer_TV.dtype == asked.compute and hidden_TD.shape[1] < WIDE:
        out = torch.mm(hidden_TD, weight_VD.T, out=buffer_TV[: len(hidden_TD)])
    else:
        out = asked.multiply(hidden_TD, weight_VD).to(buffer_TV.dtype)
    if bias_V is not None:
        out.add_(bias_V)
    return out if asked.temperature == 1 else out.div_(asked.temperature)


def _spread(
    dz_TV: Tensor, part: slice, hidden_TD: Tensor, weight_VD: Tensor, asked: _Asked, grads: Sequence[Tensor | None]
) -> None:
    """Add what these logits' gradient means for the hidden states, the weights and the bias."""
    grad_TD, grad_VD, grad_V = grads
    dz_TV = dz_TV if asked.temperature == 1 else dz_TV.div_(asked.temperature)
    if grad_V is not None:
        grad_V.add_(dz_TV.sum(0))
    dz_TV = dz_TV.to(asked.compute)
    if grad_TD is not None:
        grad_TD[part] = asked.multiply(dz_TV, weight_VD.to(asked.compute).T)
    if grad_VD is not None and grad_VD.dtype == asked.compute:
        grad_VD.addmm_(dz_TV.T, hidden_TD[part].to(asked.compute))
    elif grad_VD is not None:
        grad_VD.add_(torch.mm(dz_TV.T, hidden_TD[part].to(asked.compute)))


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
