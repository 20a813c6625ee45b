"""Many scores become one: those of an answer's steps, and those of several reward models.

Plain numbers, no tensors: rewards use it in message space. Legend: K steps of an answer, M models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev

STEPS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda scores_K: scores_K[-1],
    "mean": fmean,
}
"""From the probabilities that steps are right to one for the answer: `product` is the probability that all of them are
(PRM800K 2305.20050), `min` its bound (Math-Shepherd 2312.08935). Both punish long answers; `mean` does not."""


def pessimistic(scores_M: Sequence[float], *, spread: float) -> float:
    """mean - spread * std: what several reward models agree on (uncertainty-weighted optimisation, 2310.02743).

    Where they disagree, the policy has left what they were trained on. `spread` 0 is the mean; the std is that of
    the population.
    """
    return fmean(scores_M) - spread * pstdev(scores_M)
