"""Ratios: from each token's log(p / p_old) to the one that the surrogate uses, still in logarithms.

Legend: T trained tokens of a micro-batch, R its rows. `row_T` says whose token each is; rows are never split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from whet.formulas.constants import torch

if TYPE_CHECKING:
    from torch import Tensor


def token(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """Each token's own ratio (PPO 1707.06347, GRPO 2402.03300)."""
    return log_T


def sequence_product(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The sum over the row: the ratio of whole answers (DeepSeek-R1 2501.12948 eq. 1 as printed)."""
    return _sum(log_T, row_T, rows)[row_T]


def sequence_mean(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The mean over the row: the geometric mean of its tokens' ratios (GSPO 2507.18071 eq. 7)."""
    return (_sum(log_T, row_T, rows) / _sum(torch.ones_like(log_T), row_T, rows))[row_T]


def sequence_mean_token(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The value of `sequence_mean` with the gradient of each token's own (GSPO-token 2507.18071 eq. 13-14)."""
    return sequence_mean(log_T, row_T, rows).detach() + log_T - log_T.detach()


def none(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """A ratio of exactly 1 whose gradient is log p's: with it, r A is REINFORCE (Williams 1992)."""
    return log_T - log_T.detach()


Level: TypeAlias = "Callable[[Tensor, Tensor, int], Tensor]"
LEVELS: dict[str, Level] = {
    "none": none,
    "token": token,
    "sequence_mean": sequence_mean,
    "sequence_mean_token": sequence_mean_token,
    "sequence_product": sequence_product,
}


def truncate(log_weight_T: Tensor, *, low: float, high: float) -> Tensor:
    """min(w, high), a constant: truncated importance sampling (Espeholt 2018; TIS, Yao 2025). `low` is not used."""
    return log_weight_T.detach().exp().clamp(max=high)


def mask(log_weight_T: Tensor, *, low: float, high: float) -> Tensor:
    """w where low <= w <= high, else 0, a constant (IcePop; masked importance sampling)."""
    weight_T = log_weight_T.detach().exp()
    return weight_T * ((weight_T >= low) & (weight_T <= high))


CORRECTIONS: dict[str, Callable[..., Tensor]] = {"truncate": truncate, "mask": mask}
"""p(trainer) / p(sampler) as a weight of the loss; an estimator, so denominators stay as they are."""


def _sum(value_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The sums of rows, (R,)."""
    return value_T.new_zeros(rows).index_add(0, row_T, value_T)
