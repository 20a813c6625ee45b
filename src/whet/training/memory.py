"""Memory: how many tokens are computed at once, and what happens where that turns out to be too many.

Micro-batches change memory and speed, never the gradient, so a pass for which memory runs out can be repeated in
smaller ones, and the run goes on. What was found out about the machine is kept for the rest of the stage.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from whet.errors import TrainingError

T = TypeVar("T")
CACHED_TOKENS = 2048
"""Tokens whose activations stay in a CPU's cache: micro-batches of 1,024 to 4,096 are the fastest for models of 0.4 to
60 million parameters (docs/benchmarks.md). The value of `auto` without a plan for a GPU."""
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory"
"""The CPU's allocator has no exception class of its own."""


class TokenBudget:
    """Most tokens of a micro-batch: what the recipe says, and less once that did not fit."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.retries = 0

    def fill(self, costs: Sequence[int]) -> Iterator[list[int]]:
        """Indices in order, in runs whose costs stay within the budget; one that alone exceeds it stands alone.

        The budget is looked at for every run, so that one which shrinks on the way holds for the runs that follow.
        """
        chosen: list[int] = []
        used = 0
        for i, cost in enumerate(costs):
            if chosen and used + cost > self.tokens:
                yield chosen
                chosen, used = [], 0
            chosen.append(i)
            used += cost
        if chosen:
            yield chosen

    def shrink(self, tokens: int, parts: int) -> None:
        """Halve: a micro-batch of so many tokens did not fit. A `TrainingError` if it had one part only."""
        if parts < 2:
            raise TrainingError(
                f"out of memory in a micro-batch of {tokens:,} tokens that cannot be cut further; set "
                "train.gradient_checkpointing, or lower the longest row (max_length, max_tokens) or the rows of a group"
            )
        self.tokens = min(self.tokens, tokens // 2)
        self.retries += 1
        logging.getLogger(__name__).warning(
            "out of memory in a micro-batch of %s tokens; going on with at most %s", tokens, self.tokens
        )


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator said no, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_MESSAGE in str(error)


def attempt(work: Callable[[], T]) -> T | None:
    """What `work` returns, or None if memory ran out; by then everything that it held has been released."""
    try:
        return work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # Only here, behind the `except`, are the frames gone that hold the graph.
    gc.collect()
    torch.cuda.empty_cache()
    return None
