"""Estimates of KL(policy || reference) from sampled tokens (Schulman 2020). Legend: T trained tokens.

With d = logp - ref_logp, and what d is of sampled from the policy, k1 and k3 are unbiased in value. As a *loss* k2 has
the KL's gradient on-policy, k3 that of the forward KL (it agrees near the reference), and k1 none at all.

What d is of matters. Of a whole answer (sums over its tokens) all this holds for the KL of answers. Of a token it holds
for the KL of the next token with the prefix as it is: the sum over tokens is the answers' KL in value, but as a loss it
lacks what a token does to the KL of those that follow. k1 in the *reward* of tokens, with returns over the whole
answer, has the gradient of the answers' KL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def k1(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """d; unbiased, may be negative. Useless as a loss: its expected gradient is zero, of tokens and of answers."""
    return logp_T - ref_logp_T


def k2(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor | None = None) -> Tensor:
    """d^2 / 2; biased in value; on-policy its gradient is that of the KL of what d is of (a token or an answer)."""
    return (logp_T - ref_logp_T).square() / 2


def k3(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor | None = None) -> Tensor:
    """exp(-d) - 1 + d; never negative (the form in GRPO, 2402.03300 eq. 4)."""
    d_T = logp_T - ref_logp_T
    return (-d_T).exp() - 1 + d_T


def k3_unbiased(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor) -> Tensor:
    """r k3 with r = p / p_old in the gradient: KL's own, off-policy too, where r and d are of the same (2512.02556)."""
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
