"""Advantages of one group: how much better each rollout is than its prompt's others. Legend: G rollouts of one prompt.

An advantage is (reward - baseline) / scale. Groups whose rewards are all equal, and groups of one, get exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the standard deviation (the papers state none; verl uses this)."""


def no_baseline(rewards_G: Tensor) -> Tensor:
    """0: the raw reward is the advantage (REINFORCE)."""
    return torch.zeros_like(rewards_G)


def group_mean(rewards_G: Tensor) -> Tensor:
    """The group's mean (GRPO 2402.03300, section 4.1.2)."""
    return rewards_G.mean().expand_as(rewards_G)


def leave_one_out(rewards_G: Tensor) -> Tensor:
    """The mean of the *other* rollouts (RLOO 2402.14740 eq. 7)."""
    return (rewards_G.sum() - rewards_G) / (rewards_G.numel() - 1)


def no_scale(rewards_G: Tensor) -> Tensor:
    """1 (Dr. GRPO 2503.20783: dividing by the std favours very easy and very hard prompts)."""
    return torch.ones_like(rewards_G)


def group_std(rewards_G: Tensor) -> Tensor:
    """The group's standard deviation (Bessel) plus a small constant."""
    return (rewards_G.std(correction=1) + EPS).expand_as(rewards_G)


Statistic = Callable[[Tensor], Tensor]
BASELINES: dict[str, Statistic] = {"none": no_baseline, "group_mean": group_mean, "leave_one_out": leave_one_out}
SCALES: dict[str, Statistic] = {"none": no_scale, "group_std": group_std}


def group_advantage(rewards_G: Tensor, *, baseline: Statistic, scale: Statistic) -> Tensor:
    """(reward - baseline) / scale for each rollout of a group; exactly 0 where the group carries no signal."""
    if baseline is not no_baseline and (rewards_G.numel() < 2 or bool((rewards_G == rewards_G[0]).all())):
        return torch.zeros_like(rewards_G)
    return (rewards_G - baseline(rewards_G)) / scale(rewards_G)
