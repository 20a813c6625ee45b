"""Estimates of KL(policy || reference) from sampled tokens (Schulman 2020). Legend: T trained tokens.

With d = logp - ref_logp and tokens sampled from the policy, k1 and k3 are unbiased in value. As a *loss* k2 has
the right gradient on-policy, k3 that of the forward KL (it agrees near the reference), and k1 none at all; in the
*reward* k1 has the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def k1(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """d; unbiased, may be negative. Useless as a loss: its expected gradient is zero."""
    return logp_T - ref_logp_T


def k2(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor | None = None) -> Tensor:
    """d^2 / 2; biased in value, right in gradient on-policy."""
    return (logp_T - ref_logp_T).square() / 2


def k3(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor | None = None) -> Tensor:
    """exp(-d) - 1 + d; never negative (the form in GRPO, 2402.03300 eq. 4)."""
    d_T = logp_T - ref_logp_T
    return (-d_T).exp() - 1 + d_T


def k3_unbiased(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor) -> Tensor:
    """r k3 with r = p / p_old in the gradient: KL's own gradient, off-policy too (DeepSeek-V3.2 2512.02556)."""
    return log_ratio_T.exp() * k3(logp_T, ref_logp_T)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k2": k2,
    "k3": k3,
    "k3_unbiased": k3_unbiased,
}
"""The estimators that may be a loss, of (logp, ref_logp, log ratio to the sampling policy, which k2 and k3 ignore)."""


def adapt(coefficient: float, kl: float, *, target: float, answers: int, horizon: int) -> float:
    """The next coefficient: b (1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon) (Ziegler 1909.08593, 2.2).

    `kl` and `target` are nats for each answer (sums over its tokens), `answers` those of the step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)
