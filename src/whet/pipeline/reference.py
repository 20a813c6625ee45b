"""The reference's log-probabilities of a data set: computed once, before the first update.

A preference stage's reference is the model that it starts from, or one that is read and gone before that is loaded: no
second model is in memory (nor an adapter switched off and on). They are an artifact of the stage, in
`STAGE/reference/NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

from whet.pipeline.cached_forward import cached_forward
from whet.pipeline.stage import Context
from whet.records import Atom, TokenRow
from whet.training.base import Trainer


class Referred(Sequence[Atom]):
    """Atoms with the column `ref_logp`, which is put in place when an atom is asked for."""

    def __init__(self, atoms: Sequence[Atom], chunks: Sequence[Tensor]) -> None:
        self._atoms = atoms
        counts = [row.trained_count for atom in atoms for row in atom.rows]
        flat = torch.cat(list(chunks))
        assert len(flat) == sum(counts), "one log-probability for each trained token"
        self._logps = torch.split(flat, counts)
        self._first = [0]
        for atom in atoms:
            self._first.append(self._first[-1] + len(atom.rows))

    def __len__(self) -> int:
        return len(self._atoms)

    @overload
    def __getitem__(self, index: int) -> Atom: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Atom]: ...
    def __getitem__(self, index: int | slice) -> Atom | Sequence[Atom]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows, first = self._atoms[index].rows, self._first[index]
        logps = self._logps[first : first + len(rows)]
        return Atom(rows=tuple(row.with_columns(ref_logp=x.numpy()) for row, x in zip(rows, logps, strict=True)))


def with_reference(context: Context, trainer: Callable[[], Trainer], atoms: Sequence[Atom], name: str) -> Referred:
    """The atoms with the log-probabilities of their rows under a trainer's weights, which must be untouched yet.

    It is asked for where there is something to read. Raises what `cached_forward` raises.
    """

    def read(rows: Sequence[TokenRow]) -> Tensor:
        return torch.from_numpy(np.concatenate(trainer().forward(rows, "logp")["logp"])).float()

    rows = [row for atom in atoms for row in atom.rows]
    return Referred(atoms, list(cached_forward(context, context.folder / "reference" / name, rows, read)))
