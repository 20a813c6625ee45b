"""Policy-gradient losses: one number for each sampled token. Legend: T trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def reinforce(logp_T: Tensor, advantage_T: Tensor) -> Tensor:
    """-A log p (Williams 1992)."""
    return -advantage_T * logp_T


def clipped_surrogate(logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, *, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1-low, 1+high) A) with r = exp(logp - old_logp) (PPO 1707.06347 eq. 7; DAPO 2503.14476 eq. 10)."""
    ratio_T = (logp_T - old_logp_T).exp()
    return -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - low, 1 + high) * advantage_T)


def clipped_low(logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, *, low: float) -> Tensor:
    """1 where the lower bound stops the gradient: r < 1-low and A < 0."""
    return (((logp_T - old_logp_T).exp() < 1 - low) & (advantage_T < 0)).to(logp_T.dtype)


def clipped_high(logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, *, high: float) -> Tensor:
    """1 where the upper bound stops the gradient: r > 1+high and A > 0."""
    return (((logp_T - old_logp_T).exp() > 1 + high) & (advantage_T > 0)).to(logp_T.dtype)
