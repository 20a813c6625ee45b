"""The rows of a micro-batch as whole answers: sums over their tokens, and what is the same for all tokens of a row.

Legend: T trained tokens, R rows (answers), P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from whet.formulas.preference import Pairs
from whet.records import Atom
from whet.training.base import Batch, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSums:
    """The rows of a micro-batch as whole answers."""

    logp_R: Tensor
    """Sum of log p, with gradient."""
    ref_R: Tensor
    """The same under the reference; NaN where there is none."""
    length_R: Tensor
    constants: Mapping[str, Tensor]
    """The columns that are the same for all tokens of a row."""
    distance: Mapping[str, Tally]
    """`reference/gap`: mean |log p - log p_ref| of a token, where there is a reference."""

    def pairs(self, chosen_P: Tensor, rejected_P: Tensor, kind: str) -> Pairs:
        """The pairs of these rows, as a loss of this kind sees them."""
        step_R = self.constants.get(f"step/{kind}", torch.full_like(self.ref_R, nan))
        return Pairs(
            chosen_P=self.logp_R[chosen_P],
            rejected_P=self.logp_R[rejected_P],
            ref_chosen_P=self.ref_R[chosen_P],
            ref_rejected_P=self.ref_R[rejected_P],
            chosen_length_P=self.length_R[chosen_P],
            rejected_length_P=self.length_R[rejected_P],
            chosen_step_P=step_R[chosen_P],
            rejected_step_P=step_R[rejected_P],
        )


def sequence_sums(logp_T: Tensor, batch: Batch) -> SequenceSums:
    """Tokens summed to answers."""

    def sums(value_T: Tensor) -> Tensor:
        return value_T.new_zeros(batch.rows).index_add(0, batch.row_T, value_T)

    length_R = sums(torch.ones_like(logp_T))
    last_R = length_R.long().cumsum(0) - 1
    columns = {"weight": batch.weight_T, **batch.columns}
    distance = {}
    if "ref_logp" in columns:
        gap_T = (logp_T.detach() - columns["ref_logp"]).abs()
        distance = {"reference/gap": Tally(total=gap_T.sum(), weight=length_R.sum())}
    return SequenceSums(
        logp_R=sums(logp_T),
        ref_R=sums(columns["ref_logp"]) if "ref_logp" in columns else torch.full_like(length_R, nan),
        length_R=length_R,
        constants={name: value_T[last_R] for name, value_T in columns.items() if name != "ref_logp"},
        distance=distance,
    )


def pairs_of(atom_R: Tensor) -> tuple[Tensor, Tensor]:
    """(better, worse): all pairs of rows of one atom, whose rows stand in order of preference."""
    better_P, worse_P = (atom_R[:, None] == atom_R[None, :]).triu(1).nonzero(as_tuple=True)
    return better_P, worse_P


def add_constant(atom: Atom, name: str, value: float) -> Atom:
    """The atom with a column that is the same for all of its tokens."""
    return Atom(rows=tuple(row.with_columns(**{name: value}) for row in atom.rows))
