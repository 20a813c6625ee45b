"""Choosing a token from logits: temperature, top-k, top-p, one uniform number for each row.

Legend: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whet.sampling.base import SamplingParams


def choose(logits_SV: Tensor, params_S: Sequence[SamplingParams], uniform_S: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(token_S, logp_S): inverse-CDF sampling; the log-probability is under the distribution sampled from.

    Greedy rows (temperature 0) take the largest logit and report its log-probability at temperature 1.
    """
    first = params_S[0]
    logits_SV = logits_SV.float()
    if all((p.temperature, p.top_p, p.top_k) == (first.temperature, first.top_p, first.top_k) for p in params_S):
        return _choose(logits_SV, first, torch.tensor(uniform_S, dtype=torch.float64, device=logits_SV.device))
    chosen = [choose(logits_SV[i : i + 1], [p], [u]) for i, (p, u) in enumerate(zip(params_S, uniform_S, strict=True))]
    return torch.cat([token for token, _ in chosen]), torch.cat([logp for _, logp in chosen])


def _choose(logits_SV: Tensor, params: SamplingParams, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
    if params.temperature == 0:
        token_S = logits_SV.argmax(-1)
        logp_SV = logits_SV.log_softmax(-1)
    else:
        logp_SV = truncate(logits_SV / params.temperature, top_p=params.top_p, top_k=params.top_k).log_softmax(-1)
        cdf_SV = logp_SV.double().exp().cumsum(-1)
        # Rounding leaves the last entry near 1, not at it; scaling by it keeps every draw inside the support.
        token_S = torch.searchsorted(cdf_SV, uniform_S[:, None] * cdf_SV[:, -1:], right=True).squeeze(-1)
        token_S = token_S.clamp_max(logits_SV.shape[-1] - 1)
    return token_S, logp_SV.gather(-1, token_S[:, None]).squeeze(-1)


def truncate(logits_SV: Tensor, *, top_p: float, top_k: int | None) -> Tensor:
    """Logits with everything outside top-k and then the nucleus (top-p, Holtzman 2019) at -inf."""
    if top_k is not None and top_k < logits_SV.shape[-1]:
        smallest = logits_SV.topk(top_k, dim=-1).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < smallest, float("-inf"))
    if top_p < 1:
        sorted_SV, order = logits_SV.sort(-1, descending=True)
        p_SV = sorted_SV.softmax(-1)
        outside = p_SV.cumsum(-1) - p_SV >= top_p  # the token that crosses the bound stays
        logits_SV = logits_SV.masked_fill(outside.gather(-1, order.argsort(-1)), float("-inf"))
    return logits_SV
