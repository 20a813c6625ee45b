"""Reductions as data: the weight that each trained token of a row has in the step's loss.

Computed once over the whole optimizer step, before it is split into micro-batches or ranks, so that no split can
change the loss. Legend: N rows of the step; `lengths_N` counts their trained tokens. Returned is one weight per
row, the same for each of its tokens. Rows without trained tokens weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def token_mean(lengths_N: Sequence[int]) -> list[float]:
    """1 / tokens of the step: every token counts the same (DAPO's released code)."""
    total = sum(lengths_N)
    return [1 / total if length else 0.0 for length in lengths_N]


def sequence_mean(lengths_N: Sequence[int]) -> list[float]:
    """1 / (rows x own length): every row counts the same, however long (GRPO 2402.03300 eq. 3)."""
    rows = sum(length > 0 for length in lengths_N)
    return [1 / (rows * length) if length else 0.0 for length in lengths_N]


def sequence_sum_over_constant(lengths_N: Sequence[int], *, constant: int) -> list[float]:
    """1 / (rows x constant): no length in the denominator (Dr. GRPO 2503.20783; the constant is max_tokens)."""
    rows = sum(length > 0 for length in lengths_N)
    return [1 / (rows * constant) if length else 0.0 for length in lengths_N]


Reduction = Callable[[Sequence[int]], list[float]]
REDUCTIONS: dict[str, Callable[..., list[float]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum_over_constant": sequence_sum_over_constant,
}
