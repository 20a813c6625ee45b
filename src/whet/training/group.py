"""A trainer spread over ranks, as its driver sees it: rows are cut, commands sent, metrics added.

The driver decides everything and the ranks decide nothing, so signals, data order and seeds cannot come apart. Which
rank computes what follows from the rows alone (longest processing time first, by tokens), and the gradient does not
depend on it: weights were written over the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

from whet.errors import TrainingError
from whet.models.language import Want
from whet.records import Atom, Column, Metric, TokenRow, add_metrics
from whet.training.base import Objective, OptimResult
from whet.training.engine import CACHED_TOKENS, share_prompts

EVEN = 1.1
"""A cut is good enough where no rank has more than so many times its share of the tokens."""


class GroupFailure(TrainingError):
    """A rank died, failed or was silent; the group is gone, and may be started again from the last checkpoint."""

    def __init__(self, rank: int, verb: str, since_s: float, why: str, *, most_tokens: int | None = None) -> None:
        super().__init__(f"trainer rank {rank}: {why} ({since_s:.1f} s after the command {verb!r})")
        self.rank, self.verb, self.since_s = rank, verb, since_s
        self.most_tokens = most_tokens
        """Where memory ran out: the largest micro-batch that may fit."""


class RankOutOfMemory(TrainingError):
    """Memory ran out on a rank; the group may be started again with micro-batches of at most `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"out of memory; micro-batches of at most {tokens:,} tokens may fit")
        self.tokens = tokens

    def __reduce__(self) -> tuple[type[RankOutOfMemory], tuple[int]]:
        return RankOutOfMemory, (self.tokens,)


class RankGroup(Protocol):
    """Processes that all do what the driver says, at the same time."""

    @property
    def ranks(self) -> int:
        """How many there are."""

    def start(self, deadline_s: float) -> None:
        """Start them; where they run, nothing is done. Raises `GroupFailure` for the first that does not answer."""

    def call(self, verb: str, parts: Sequence[Sequence[Any]], deadline_s: float) -> list[Any]:
        """What each rank returns for its part, the command's arguments.

        Raises `GroupFailure` for the rank that died, failed or did not answer in time, and a `UserError` of the ranks
        as it is; the group is stopped by then.
        """

    def stop(self) -> None:
        """End them: the run is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A step's atoms by rank, and what a rank computes, at weight 0, while another one has more passes."""

    parts: tuple[tuple[Atom, ...], ...]
    idle: Atom | None


def cut_atoms(atoms: Sequence[Atom], ranks: int, *, together: bool) -> Cut:
    """The atoms that weigh anything, spread evenly by tokens; one that is too large for that is cut, unless `together`.

    A pure function of the atoms, so that a plan can say what it will be.
    """
    pieces = [atom for atom in atoms if any(row.columns["weight"].any() for row in atom.rows)]
    costs = [atom.cost for atom in pieces]
    idle = pieces[costs.index(min(costs))] if costs else None
    if idle is not None and not together:  # one row: a whole group may be more than a micro-batch holds
        weighty = (row for atom in pieces for row in atom.rows if row.columns["weight"].any())
        idle = Atom(rows=(min(weighty, key=lambda row: len(row.tokens)),))
    while True:
        parts = spread(costs, ranks)
        loads = [sum(costs[i] for i in part) for part in parts]
        worst = parts[loads.index(max(loads))]
        large = max((i for i in worst if len(pieces[i].rows) > 1), key=costs.__getitem__, default=None)
        if together or large is None or max(loads) <= EVEN * sum(loads) / ranks:
            return Cut(parts=tuple(tuple(pieces[i] for i in part) for part in parts), idle=idle)
        rows = pieces[large].rows
        halves = [Atom(rows=rows[: len(rows) // 2]), Atom(rows=rows[len(rows) // 2 :])]
        pieces[large : large + 1], costs[large : large + 1] = halves, [half.cost for half in halves]


def spread(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices by rank, in order: the most expensive first, each to the rank that has least."""
    heap = [(0, rank) for rank in range(ranks)]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(heap)
        parts[rank].append(i)
        heapq.heappush(heap, (load + costs[i], rank))
    return [sorted(part) for part in parts]


class GroupTrainer:
    """`Trainer` over the ranks of a group, under the name that they know it by."""

    def __init__(self, group: RankGroup, name: str, *, deadline_s: float, context: int = 1) -> None:
        """So many ranks, one after another, compute the same rows together (`models.context`)."""
        self.group, self.name, self.deadline_s, self.context = group, name, deadline_s, context

    def forward_backward(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """Each rank adds the gradient of its atoms; metrics are summed."""
        return self._summed("forward_backward", atoms, objective)

    def evaluate(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """The metrics, without a gradient."""
        return self._summed("evaluate", atoms, objective)

    def optim_step(self, lr_factor: float | None) -> OptimResult:
        """One step of all ranks: the norm and what follows from it are theirs together."""
        result: OptimResult = self._call("optim_step", [(lr_factor,)] * self.group.ranks)[0]
        return result

    def forward(
        self, rows: Sequence[TokenRow], *want: Want, temperature: float = 1.0, frozen: str | None = None, top_k: int = 0
    ) -> dict[str, list[Column]]:
        """The columns in the order of the rows; rows with a common prompt are read by the same rank."""
        groups = share_prompts(rows, CACHED_TOKENS)
        costs = [sum(len(rows[i].tokens) for i in group) for group in groups]
        chosen = [[i for g in part for i in groups[g]] for part in spread(costs, self.group.ranks // self.context)]
        idle = min(rows, key=lambda row: len(row.tokens), default=None)
        how = {"temperature": temperature, "frozen": frozen, "top_k": top_k, "idle": idle}
        found = self._shared("forward", [([rows[i] for i in part], *want, how) for part in chosen])
        places = {i: (rank, k) for rank, part in enumerate(chosen) for k, i in enumerate(part)}
        where = [places[i] for i in range(len(rows))]
        return {name: [found[rank][name][k] for rank, k in where] for name in found[0]}

    def update_frozen(self, name: str, decay: float) -> None:
        """Move a frozen copy."""
        self._call("update_frozen", [(name, decay)] * self.group.ranks)

    def save(self, folder: Path) -> None:
        """Each rank writes its shards."""
        self._call("save", [(folder.absolute(),)] * self.group.ranks)

    def load(self, folder: Path) -> None:
        """Continue from what any number of ranks saved."""
        self._call("load", [(folder.absolute(),)] * self.group.ranks)

    def export(self, folder: Path) -> None:
        """The whole model, written by the first rank."""
        self._call("export", [(folder.absolute(),)] * self.group.ranks)

    def gather(self, path: Path) -> str:
        """The trainable weights in one safetensors file, and its SHA-256."""
        digest: str = self._call("gather", [(path.absolute(),)] * self.group.ranks)[0]
        return digest

    def _summed(self, verb: str, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        cut = cut_atoms(atoms, self.group.ranks // self.context, together=objective.compares)
        found: list[Mapping[str, Metric]] = self._shared(verb, [(part, objective, cut.idle) for part in cut.parts])
        return reduce(add_metrics, found, dict[str, Metric]())

    def _shared(self, verb: str, parts: Sequence[Sequence[Any]]) -> list[Any]:
        """Each part by the ranks of a context, of which one is heard."""
        return self._call(verb, [part for part in parts for _ in range(self.context)])[:: self.context]

    def _call(self, verb: str, parts: Sequence[Sequence[Any]]) -> list[Any]:
        return self.group.call("trainer", [(self.name, verb, *part) for part in parts], self.deadline_s)
