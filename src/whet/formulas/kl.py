"""Estimates of KL(policy || reference) from sampled tokens (Schulman 2020). Legend: T trained tokens.

With d = logp - ref_logp and tokens sampled from the policy, k1 and k3 are unbiased in value. As a *loss* k2 has
the right gradient on-policy, k3 that of the forward KL (it agrees near the reference), and k1 none at all.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """d; unbiased, may be negative. Useless as a loss: its expected gradient is zero."""
    return logp_T - ref_logp_T


def k2(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """d^2 / 2; biased in value, right in gradient on-policy."""
    return (logp_T - ref_logp_T).square() / 2


def k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """exp(-d) - 1 + d; never negative (the form in GRPO, 2402.03300 eq. 4)."""
    d_T = logp_T - ref_logp_T
    return (-d_T).exp() - 1 + d_T


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3}
"""The estimators that may be a loss."""
