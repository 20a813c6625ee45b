"""Rows as micro-batches: which are computed together, and what happens where that turns out to be too many.

How a step is cut is a matter of memory and speed and never changes the gradient, because weights were written over
the whole step. So the cut is a pure function of the rows and the budget, which several processes can evaluate alike,
and a pass for which memory runs out can be repeated in smaller ones. What was found out about the machine is kept for
the rest of the stage.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from whet.errors import TrainingError
from whet.records import Atom, Column, TokenRow
from whet.training.base import Batch

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


def microbatches(atoms: Sequence[Atom], budget: TokenBudget, *, together: bool) -> Iterator[list[Atom]]:
    """The rows that weigh anything, in micro-batches within the budget; a row is never cut.

    Rows that an objective compares stay `together`; any other atom is cut where it exceeds the budget, and the prompt
    that its rows share is computed once for each cut. Similar lengths go together, which saves padding in attention;
    ties keep their order, so the cut is deterministic.
    """
    heavy = [atom for atom in atoms if any(row.columns["weight"].any() for row in atom.rows)]
    pieces = heavy if together else [piece for atom in heavy for piece in _cut(atom, budget.tokens)]
    pieces.sort(key=lambda atom: max(len(row.tokens) for row in atom.rows))
    for chosen in budget.fill([atom.cost for atom in pieces]):
        yield [pieces[i] for i in chosen]


def parts(atoms: Sequence[Atom], *, together: bool) -> int:
    """Into how many micro-batches these could be cut at most."""
    return len(atoms) if together else sum(len(atom.rows) for atom in atoms)


def most_uncut(atoms: Sequence[Atom], *, together: bool) -> int:
    """Most tokens of what no micro-batch cuts: an atom, or a row of it."""
    return max(atom.cost if together else max(len(row.tokens) for row in atom.rows) for atom in atoms)


def share_prompts(rows: Sequence[TokenRow], budget_tokens: int) -> list[list[int]]:
    """Indices of rows that begin with the same shared prompt, in groups that cost at most `budget_tokens` if they can.

    Groups of similar length stand next to one another; the order depends on the rows alone.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(row.prompt, []).append(i)
    groups = []
    for prompt, indices in by_prompt.items():
        runs = _fill([rows[i] for i in indices], budget_tokens if prompt else 1)
        groups += [[indices[k] for k in run] for run in runs]
    return sorted(groups, key=lambda group: max(len(rows[i].tokens) for i in group))


def as_batch(atoms: Sequence[Atom], like: Tensor) -> Batch:
    """The rows' columns as tensors: numbers in the precision of `like`, whole numbers as they are."""
    rows = [row for atom in atoms for row in atom.rows]
    counts_R = np.array([row.trained_count for row in rows])
    columns = {name: _tensor([row.columns[name] for row in rows], like) for name in rows[0].columns}
    row_T = torch.from_numpy(np.repeat(np.arange(len(rows)), counts_R))
    atom_R = torch.from_numpy(np.repeat(np.arange(len(atoms)), [len(atom.rows) for atom in atoms]))
    return Batch(
        weight_T=columns.pop("weight"),
        row_T=row_T.to(like.device),
        rows=len(rows),
        atom_R=atom_R.to(like.device),
        columns=columns,
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


def _tensor(columns: Sequence[Column], like: Tensor) -> Tensor:
    values = torch.from_numpy(np.concatenate(columns))
    return values.to(like.device, like.dtype if values.is_floating_point() else torch.long)


def _cut(atom: Atom, budget_tokens: int) -> list[Atom]:
    if atom.cost <= budget_tokens:
        return [atom]
    return [Atom(rows=tuple(atom.rows[k] for k in run)) for run in _fill(atom.rows, budget_tokens)]


def _fill(rows: Sequence[TokenRow], budget_tokens: int) -> Iterator[list[int]]:
    """Runs of rows of one prompt that cost at most the budget with it; at least one row is in each."""
    budget = TokenBudget(budget_tokens - rows[0].shared)
    return budget.fill([len(row.tokens) - row.shared for row in rows])
