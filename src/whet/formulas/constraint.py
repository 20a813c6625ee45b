"""Reward under a constraint: max over policies, min over l >= 0 of J_R - l (J_C - d) (Safe RLHF 2310.12773).

Plain numbers, no tensors: J are means over the answers of a step, l is the Lagrange multiplier, d the limit.
"""

from __future__ import annotations

from math import exp


def charged(reward: float, cost: float, *, multiplier: float) -> float:
    """(R - l C) / (1 + l): what any advantage that is linear in the reward makes the combined one of Safe RLHF."""
    return (reward - multiplier * cost) / (1 + multiplier)


def next_multiplier(multiplier: float, cost: float, *, limit: float, rate: float, most: float) -> float:
    """exp(ln l + rate l (J_C - d)), at most `most` (Safe RLHF 2310.12773, section 3.3)."""
    # The exponent is held where the result is beyond any bound anyway, so that exp does not overflow.
    return min(multiplier * exp(min(rate * multiplier * (cost - limit), 50.0)), most)
