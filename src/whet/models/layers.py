"""Norms and rotary embeddings whose backward passes are written out: fewer passes over memory, fewer saved tensors.

Beside its matrix products a training step on a CPU is bound by memory. transformers writes an RMSNorm as six
operations, and autograd answers with a dozen, half of which make a tensor as large as the hidden states. Here the
forward pass has the same bits; gradients agree to rounding. A module is taken only where it is found to compute the
same on a few numbers, so another kind of norm or rotation stays as it is.

Legend: N rows, D hidden size or head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

ROTATE = "apply_rotary_pos_emb"
"""The function by which transformers' attention modules rotate queries and keys."""
Rotate = Callable[..., tuple[Tensor, Tensor]]


def simplify(module: nn.Module) -> None:
    """Let every usual norm and attention module inside compute as above."""
    for part in module.modules():
        kind: Any = type(part)
        if _is_norm(kind):
            part.forward = MethodType(_norm, part)
        elif (forward := _rotating(kind)) is not None:
            part.forward = MethodType(forward, part)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        grad = grads[0]
        D = len(weight_D)
        steep_ND = (grad * x).reshape(-1, D)  # of heads before tokens it is no view
        of_weight = torch.mv(steep_ND.t(), inverse.reshape(-1)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        shift = torch.mv(steep_ND, weight_D).view(inverse.shape).mul_(inverse.pow(3)).div_(-D)
        return (grad * weight_D).mul_(inverse).addcmul_(x, shift), of_weight, None


class _Rotary(torch.autograd.Function):
    """x cos + (-second half, first half) sin; cos and sin broadcast to x and have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (first, second), (sin_1, sin_2) = x.chunk(2, -1), sin.chunk(2, -1)
        out_1, out_2 = out.chunk(2, -1)
        out_1.sub_(second * sin_1)  # not addcmul_, which rounds once where transformers rounds twice
        out_2.add_(first * sin_2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        of_x = grads[0] * cos
        (first, second), (sin_1, sin_2) = grads[0].chunk(2, -1), sin.chunk(2, -1)
        of_1, of_2 = of_x.chunk(2, -1)
        of_1.addcmul_(second, sin_2)
        of_2.addcmul_(first, sin_1, value=-1)
        return of_x, None, None


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    """Such a module's forward pass; in other precisions its own."""
    if _plain(hidden_states) and _plain(module.weight):
        return _RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]
    return type(module).forward(module, hidden_states)  # type: ignore[no-any-return]


def _rotate(theirs: Rotate, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of (1, H, N, D) and (1, K, N, D) by (1, N, D)."""
    if not all(_plain(each) for each in (query, key, cos, sin)) or cos.shape[-1] != query.shape[-1]:
        return theirs(query, key, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)  # type: ignore[no-untyped-call]


def _plain(tensor: Tensor) -> bool:
    """Whether it is a float32 tensor of one process: nothing that casts, shards or only pretends to have numbers."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32


@cache
def _is_norm(kind: Any) -> bool:
    """Whether modules of this class compute `_RMSNorm`, by their own word on a few numbers."""
    if not kind.__name__.endswith("RMSNorm") or not kind.__module__.startswith("transformers."):
        return False
    with torch.device("cpu"), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        try:
            module: Any = kind(8, eps=0.25)
            if {name for name, _ in module.named_parameters()} != {"weight"} or module.variance_epsilon != 0.25:
                return False
            x, weight = torch.randn(3, 8), torch.randn(8)
            with torch.no_grad():
                module.weight.copy_(weight)
                return torch.equal(module(x), _RMSNorm.apply(x, weight, 0.25))  # type: ignore[no-untyped-call]
        except (TypeError, AttributeError, RuntimeError):  # of other arguments, or of a weight of another shape
            return False


@cache
def _rotating(kind: Any) -> Callable[..., Any] | None:
    """The class's forward pass with our rotation in the place of the same one by transformers; None: leave it."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or ROTATE not in forward.__code__.co_names:
        return None
    theirs = forward.__globals__.get(ROTATE)
    if theirs is None or not kind.__module__.startswith("transformers."):
        return None
    draw = torch.Generator("cpu").manual_seed(0)
    shapes = ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    given = [torch.randn(shape, generator=draw, device="cpu") for shape in shapes]
    try:
        same = all(torch.equal(a, b) for a, b in zip(theirs(*given), _rotate(theirs, *given), strict=True))
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return None
    if not same:
        return None

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        return (
            theirs(query, key, cos, sin, *others, **named) if others or named else _rotate(theirs, query, key, cos, sin)
        )

    names = {**forward.__globals__, ROTATE: rotate}
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied
