"""Choosing a token from logits: temperature, top-k, top-p, one uniform number for each row.

Legend: S sequences, V vocabulary, B blocks of the vocabulary, X tokens of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whet.sampling.base import SamplingParams

BLOCK = 64
"""Tokens whose probabilities are added up before they are accumulated over the vocabulary."""
BELOW_ONE = 1 - 2**-53
"""A share of a sum in double precision that stays below the sum."""


def choose(logits_SV: Tensor, params: SamplingParams, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
    """(token_S, logp_S): inverse-CDF sampling; the log-probability is under the distribution sampled from.

    `uniform_S` are double-precision numbers of [0, 1). Temperature 0 takes the largest logit and reports its
    log-probability at temperature 1. Where logits are no numbers the log-probability is NaN, and the token any.
    """
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    if params.temperature not in (0, 1):
        logits_SV = logits_SV / params.temperature
    if params.temperature != 0:
        logits_SV = truncate(logits_SV, top_p=params.top_p, top_k=params.top_k)
    p_SV = logits_SV.softmax(-1)
    p_SBX = F.pad(p_SV, (0, -p_SV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    token_S = (_largest(p_SBX) if params.temperature == 0 else _invert(p_SBX, uniform_S[:, None]))[:, 0]
    token_S.clamp_max_(p_SV.shape[-1] - 1)
    return token_S, p_SV.gather(-1, token_S[:, None])[:, 0].log_()


def _largest(p_SBX: Tensor) -> Tensor:
    """The first of the largest, first by blocks: an argmax over the whole vocabulary takes ten times as long."""
    block_S1 = p_SBX.amax(-1).argmax(-1, keepdim=True)
    return block_S1 * BLOCK + _of_block(p_SBX, block_S1).argmax(-1, keepdim=True)


def _invert(p_SBX: Tensor, uniform_S1: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes the uniform number: its block, then its place in it.

    A block or token without probability is never the first whose sum exceeds a number, provided that the number stays
    below the last sum.
    """
    cdf_SB = p_SBX.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_S1 = uniform_S1 * cdf_SB[:, -1:]
    block_S1 = torch.searchsorted(cdf_SB, wanted_S1, right=True).clamp_max_(cdf_SB.shape[-1] - 1)
    before_S1 = torch.where(block_S1 > 0, cdf_SB.gather(-1, (block_S1 - 1).clamp_min_(0)), 0.0)
    inner_SX = _of_block(p_SBX, block_S1).double().cumsum(-1)
    within_S1 = torch.minimum((wanted_S1 - before_S1).clamp_min_(0), inner_SX[:, -1:] * BELOW_ONE)
    return block_S1 * BLOCK + torch.searchsorted(inner_SX, within_S1, right=True)


def _of_block(p_SBX: Tensor, block_S1: Tensor) -> Tensor:
    return p_SBX[torch.arange(len(p_SBX), device=p_SBX.device), block_S1[:, 0]]


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
