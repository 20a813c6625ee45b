"""Reductions as data: the weight that each trained token of an answer has in the step's loss.

Computed once over the whole optimizer step, before it is split into rows, micro-batches or ranks, so that no split can
change the loss. Legend: N answers of the step; `lengths_N` counts their trained tokens, over all rows of an answer.
Returned is one weight per answer, the same for each of its tokens. Answers without trained tokens weigh nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence


def token_mean(lengths_N: Sequence[int]) -> list[float]:
    """1 / tokens of the step: every token counts the same (DAPO's released code)."""
    total = sum(lengths_N)
    return [1 / total if length else 0.0 for length in lengths_N]


def group_token_mean(lengths_N: Sequence[int], *, groups_N: Sequence[int]) -> list[float]:
    """1 / (groups x tokens of the answer's group): every prompt counts the same (DAPO 2503.14476 eq. 8 as printed)."""
    tokens: dict[int, int] = defaultdict(int)
    for length, group in zip(lengths_N, groups_N, strict=True):
        tokens[group] += length
    groups = sum(total > 0 for total in tokens.values())
    return [1 / (groups * tokens[group]) if length else 0.0 for length, group in zip(lengths_N, groups_N, strict=True)]


def sequence_mean(lengths_N: Sequence[int]) -> list[float]:
    """1 / (answers x own length): every answer counts the same, however long (GRPO 2402.03300 eq. 3)."""
    answers = sum(length > 0 for length in lengths_N)
    return [1 / (answers * length) if length else 0.0 for length in lengths_N]


def sequence_sum(lengths_N: Sequence[int]) -> list[float]:
    """1 / answers: log p of whole answers, averaged over answers (RLOO 2402.14740, ReMax 2310.10505)."""
    answers = sum(length > 0 for length in lengths_N)
    return [1 / answers if length else 0.0 for length in lengths_N]


def sequence_sum_over_constant(lengths_N: Sequence[int], *, constant: int) -> list[float]:
    """1 / (answers x constant): no length in the denominator (Dr. GRPO 2503.20783; the constant is max_tokens)."""
    answers = sum(length > 0 for length in lengths_N)
    return [1 / (answers * constant) if length else 0.0 for length in lengths_N]


def token_sum(lengths_N: Sequence[int]) -> list[float]:
    """1: the learning rate then means something else for every batch size."""
    return [1.0 if length else 0.0 for length in lengths_N]


REDUCTIONS: dict[str, Callable[[Sequence[int], Sequence[int], int], list[float]]] = {
    "token_mean": lambda lengths_N, groups_N, constant: token_mean(lengths_N),
    "group_token_mean": lambda lengths_N, groups_N, constant: group_token_mean(lengths_N, groups_N=groups_N),
    "sequence_mean": lambda lengths_N, groups_N, constant: sequence_mean(lengths_N),
    "sequence_sum": lambda lengths_N, groups_N, constant: sequence_sum(lengths_N),
    "sequence_sum_over_constant": lambda lengths_N, groups_N, constant: sequence_sum_over_constant(
        lengths_N, constant=constant
    ),
    "token_sum": lambda lengths_N, groups_N, constant: token_sum(lengths_N),
}
"""All as functions of (trained tokens of each answer, its group, the stage's `max_tokens`)."""
