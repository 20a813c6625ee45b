"""What could be done without a gate: fixed weights over objectives, the best of them found on the training data.

Legend: A answers to one prompt (the best first), K objectives, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

ROUNDS = 30
RIDGE = 1e-3
"""Of the weights' squares, for a mixture under which every pair is right has no largest scale."""


def fixed_mixtures(said: Sequence[np.ndarray], names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Weights (K,) by a name for people, from what objectives say, (A, K) of each comparison.

    All alike, the one objective that is right most often, and the Bradley-Terry fit of free weights.
    """
    difference_PK = np.concatenate([[better - worse for better, worse in combinations(each, 2)] for each in said])
    best = int((difference_PK > 0).mean(0).argmax())
    alone = np.eye(len(names))[best]
    return {
        "all objectives alike": np.ones(len(names)),
        f"{names[best]} alone": alone,
        "the best fixed mixture": _fitted(difference_PK),
    }


def mixed(said: Sequence[np.ndarray], weight_K: np.ndarray) -> list[tuple[float, ...]]:
    """The scores of each comparison's answers under fixed weights."""
    return [tuple((each @ weight_K).tolist()) for each in said]


def _fitted(difference_PK: np.ndarray) -> np.ndarray:
    """The weights of the least Bradley-Terry loss, by Newton's method."""
    weight_K = np.zeros(difference_PK.shape[1])
    for _ in range(ROUNDS):
        right_P = 1 / (1 + np.exp(-(difference_PK @ weight_K)))
        gradient_K = difference_PK.T @ (right_P - 1) / len(difference_PK) + RIDGE * weight_K
        curvature_P = right_P * (1 - right_P)
        hessian_KK = (difference_PK.T * curvature_P) @ difference_PK / len(difference_PK)
        weight_K = weight_K - np.linalg.solve(hessian_KK + RIDGE * np.eye(len(weight_K)), gradient_K)
    return weight_K
