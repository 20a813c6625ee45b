"""Reward under a constraint: max over policies, min over l >= 0 of J_R - l (J_C - d) (Safe RLHF 2310.12773).

The multiplier l is a controller's word (Stooke, Achiam, Abbeel 2020, 2007.03964, without the derivative). Plain
numbers, no tensors: J are means over the answers of a step, d is the limit, I the integral in units of l.
"""

from __future__ import annotations


def charged(reward: float, cost: float, *, multiplier: float) -> float:
    """(R - l C) / (1 + l): what any advantage that is linear in the reward makes the combined one of Safe RLHF."""
    return (reward - multiplier * cost) / (1 + multiplier)


def controlled(integral: float, cost: float, *, limit: float, gain: float, most: float) -> float:
    """I + K (J_C - d), held between 0 and `most`: with K_I the next integral, with K_P on top of that l."""
    return min(max(integral + gain * (cost - limit), 0.0), most)
