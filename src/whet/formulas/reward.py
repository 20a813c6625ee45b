"""Reward models: what comparisons, labels and steps teach a scalar, one number for each pair, place or label.

Legend: P pairs, K answers to one prompt (the best first) or K objectives, T labelled tokens, N answers. Scores are raw
outputs of a scalar head: their differences are log-odds of being preferred, and `sigmoid` makes a step's score the
probability of being right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def bradley_terry(
    better_P: Tensor, worse_P: Tensor, *, margin_P: Tensor | float, confidence_P: Tensor | float
) -> Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d), with d = r_w - r_l - m (InstructGPT 2203.02155 eq. 1).

    The margin m is by how much the better answer is better (Llama-2 2307.09288 eq. 2), the confidence p how likely it
    is the better one (RLAIF 2309.00267); hard labels have p = 1.
    """
    difference_P = better_P - worse_P - margin_P
    return softplus(-difference_P) + (1 - confidence_P) * difference_P


def centring(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """(r_w + r_l)^2: holds scores near zero, where comparisons alone leave them free (2312.09244)."""
    return (better_P + worse_P).square()


def plackett_luce(score_K: Tensor) -> Tensor:
    """log sum_{j >= k} e^{r_j} - r_k: place k is won against all that come after it; the last place is 0.

    The sum over places is -log p of the ranking; for two answers it is `bradley_terry` without a margin.
    """
    return score_K.flip(0).logcumsumexp(0).flip(0) - score_K


def label_loss(score_T: Tensor, label_T: Tensor) -> Tensor:
    """-y log sigmoid(r) - (1 - y) log sigmoid(-r), y in [0, 1].

    At the end of a step: process supervision (2305.20050; soft labels: 2312.08935). At every token of an answer with
    the answer's own label: an outcome verifier (Cobbe et al. 2110.14168).
    """
    return softplus(score_T) - label_T * score_T


def rating_loss(score_TK: Tensor, rating_TK: Tensor) -> Tensor:
    """(r - y)^2 for each objective, 0 where its rating y is NaN, i.e. missing (ArmoRM 2406.12845, section 3.1)."""
    rated_TK = rating_TK.isfinite()
    return (score_TK - rating_TK.where(rated_TK, 0.0)).square() * rated_TK


def slopes(score_NK: Tensor, against_N: Tensor) -> Tensor:
    """lambda_k = cov(r_k, v) / var(v): the most of v that r_k predicts; 0 where v is the same for all."""
    centred_N = against_N - against_N.mean()
    variance = centred_N.square().mean()
    covariance_K = (centred_N[:, None] * score_NK).mean(0)
    return covariance_K / variance if variance > 0 else torch.zeros_like(covariance_K)


def debiased(score_TK: Tensor, against_T: Tensor, *, slope_K: Tensor) -> Tensor:
    """r_k - lambda_k v: with lambda from `slopes` no objective goes with v (ArmoRM 2406.12845, section 3.3)."""
    return score_TK - slope_K * against_T[:, None]


def gated(score_TK: Tensor, gate_TK: Tensor, *, scale: Tensor | float) -> Tensor:
    """s sum_k g_k r_k: the weights g are of the prompt and sum to 1; s makes differences log-odds (ArmoRM)."""
    return scale * (gate_TK * score_TK).sum(-1)
