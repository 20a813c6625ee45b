"""Merging models of one shape, tensor by tensor. Legend: M models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, pi
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le

from whet.formulas.constants import torch

if TYPE_CHECKING:
    from torch import Tensor

NEARLY = 1e-4
"""Radians between two directions, or between them and their opposites, that count as one line."""


def linear(base: Tensor, tensors: Sequence[Tensor], weight_M: Sequence[float]) -> Tensor:
    """sum w x / sum w: model soups (2203.05482), and with falling weights the EMA of a run; the base has no part."""
    return _sum(tensors, weight_M) / sum(weight_M)


def slerp(base: Tensor, tensors: Sequence[Tensor], weight_M: Sequence[float]) -> Tensor:
    """sin((1-t) a)/sin(a) x + sin(t a)/sin(a) y with a the angle between x and y (Shoemake 1985), t = w_y / sum w."""
    left, right = tensors
    t = weight_M[1] / sum(weight_M)
    scale = left.norm() * right.norm()
    angle = torch.acos(((left * right).sum() / scale).clamp(-1, 1)) if scale > 0 else torch.zeros(())
    if not NEARLY < float(angle) < pi - NEARLY:
        return torch.lerp(left, right, t)
    return (torch.sin((1 - t) * angle) * left + torch.sin(t * angle) * right) / torch.sin(angle)


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight_M: Sequence[float],
    *,
    scale: Annotated[float, Gt(0), "What the sum of the differences from the base is multiplied by."] = 1.0,
) -> Tensor:
    """base + scale x sum w (x - base) (2212.04089); a negative weight takes a task away."""
    return base + scale * _sum([each - base for each in tensors], weight_M)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight_M: Sequence[float],
    *,
    scale: Annotated[float, Gt(0), "What the merged difference from the base is multiplied by."] = 1.0,
    density: Annotated[float, Gt(0), Le(1), "Share of a model's differences that is kept, the largest."] = 0.2,
) -> Tensor:
    """base + scale x mean of the differences that agree with the elected sign: trim, elect, merge (2306.01708)."""
    kept = [weight * _trimmed(each - base, density) for each, weight in zip(tensors, weight_M, strict=True)]
    elected = torch.stack(kept).sum(0).sign()
    agreeing = [torch.where(each.sign() == elected, each, 0.0) for each in kept]
    shares = [weight * (each != 0) for each, weight in zip(agreeing, weight_M, strict=True)]
    total = torch.stack(shares).sum(0)
    return base + scale * torch.where(total != 0, torch.stack(agreeing).sum(0) / total, 0.0)


MERGES: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
}


def _sum(tensors: Sequence[Tensor], weight_M: Sequence[float]) -> Tensor:
    return torch.stack([weight * each for each, weight in zip(tensors, weight_M, strict=True)]).sum(0)


def _trimmed(difference: Tensor, density: float) -> Tensor:
    """The largest by magnitude; the others are 0."""
    count = ceil(density * difference.numel())
    least = difference.abs().flatten().kthvalue(difference.numel() - count + 1).values
    return torch.where(difference.abs() >= least, difference, 0.0)
