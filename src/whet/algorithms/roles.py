"""Roles of tokens in a policy gradient: which are trained, and how far their gradients pull in one direction.

The gradient of a step is the sum of what its calls and its other tokens ask for; the angle between the two follows
from the three norms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import acos, degrees, isfinite, nan

from whet.algorithms.groups import Answer, only_roles, with_roles
from whet.models.marks import CALL, ROLES, RoleTable
from whet.records import Atom
from whet.training.base import Objective, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What a recipe asks of them."""

    table: RoleTable
    only: Collection[str] | None = None
    """Those that are trained; None: all."""
    angle: bool = False

    def with_column(self, answers: Sequence[Answer]) -> list[Answer]:
        """Add `role`, as a number."""
        return [replace(a, rows=tuple(with_roles(row, self.table) for row in a.rows)) for a in answers]

    def trained(self, answers: Sequence[Answer]) -> list[Answer]:
        """The answers with the tokens of the wanted roles trained alone; after all statistics."""
        wanted = [ROLES.index(role) for role in self.only or ROLES]
        return [replace(a, rows=tuple(only_roles(row, wanted) for row in a.rows)) for a in answers]


def norms_apart(trainer: Trainer, atoms: Sequence[Atom], objective: Objective) -> tuple[float, float]:
    """The norms of the gradients of calls and of everything else; nothing is stepped."""
    norms = []
    for calls in (True, False):
        weighed = [
            replace(atom, rows=tuple(
                row.with_columns(weight=row.columns["weight"] * ((row.columns["role"] == CALL) == calls))
                for row in atom.rows
            ))
            for atom in atoms
        ]  # fmt: skip
        trainer.forward_backward(weighed, objective)
        norms.append(trainer.optim_step(None).grad_norm)
    return norms[0], norms[1]


def angle(whole: float, first: float, second: float) -> float:
    """Degrees between two gradients, from their norms and that of their sum; NaN where one is nothing."""
    if not first or not second or not all(map(isfinite, (whole, first, second))):
        return nan
    cosine = (whole**2 - first**2 - second**2) / (2 * first * second)
    return degrees(acos(min(1.0, max(-1.0, cosine))))
