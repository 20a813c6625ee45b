"""Whether learning to reason and learning to call tools add up: the interaction of the two, question by question.

The logit z of a question's accuracy is taken to be linear in what a model was trained on (CEA, 2602.00994): base,
calls alone, reasoning alone, both. Their interaction is what training on both gives beyond the sum of the two,
lambda = z_both - z_tool - z_reasoning + z_base. Below 0 they interfere.

Legend: Q questions, S samples of one, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
Scores = Mapping[str, Sequence[float]]
"""Of each question its samples, 1 for right."""


def logits(scores_QS: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """Log-odds of each question's accuracy, kept half a sample away from 0 and 1 where they would be infinite."""
    half_Q = np.array([0.5 / len(scores_S) for scores_S in scores_QS])
    mean_Q = np.clip([np.mean(scores_S) for scores_S in scores_QS], half_Q, 1 - half_Q)
    return np.log(mean_Q / (1 - mean_Q))


def interference(base: Scores, tool: Scores, reasoning: Scores, both: Scores, *, seed: int = 0) -> dict[str, float]:
    """The mean of lambda and the share of questions where it is below (above) 0; 95 % bootstrap over questions.

    Questions are those that all four models have scored answers to. Raises `ValueError` where there is none.
    """
    asked = [task for task in base if task in tool and task in reasoning and task in both]
    if not asked:
        raise ValueError("interference: the four models have no scored task in common")
    z_base, z_tool, z_reasoning, z_both = (
        logits([scores[task] for task in asked]) for scores in (base, tool, reasoning, both)
    )
    lambda_Q = z_both - z_tool - z_reasoning + z_base
    drawn_BQ = np.random.default_rng(seed).integers(0, len(asked), (RESAMPLES, len(asked)))
    found: dict[str, float] = {"questions": len(asked)}
    for name, value_Q in (("mean", lambda_Q), ("below", lambda_Q < 0), ("above", lambda_Q > 0)):
        low, high = np.quantile(value_Q[drawn_BQ].mean(1), (0.025, 0.975))
        found |= {name: float(value_Q.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found
