"""What formulas are written with: torch at its first use, constants with their ranges, and both bound together.

A recipe's keys are made from the signatures: name, range, default, text.

A constant is `name: Annotated[type, range ..., "what it does"] = published default`; where no text stands, the
formula's docstring says it.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            found = getattr(import_module("torch"), name)
            setattr(self, name, found)  # from now on without this function
            return found

    torch = _Torch()
"""Imported at its first use: a recipe is read from the signatures of formulas, and needs no tensor for that."""

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Doubt = Annotated[float, Ge(0), Lt(0.5), "Share of the labels that are taken to be the wrong way round."]
SomeDoubt = Annotated[float, Gt(0), Lt(0.5), "Share of the labels that are taken to be the wrong way round."]
Beta = Annotated[float, Gt(0), "How far the policy may go from the reference, or how sharp the contrast is."]


class Bound(partial[Any]):
    """A formula with its constants; it equals another of the same function and constants."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and (self.func, self.keywords) == (other.func, other.keywords)

    def __hash__(self) -> int:
        return hash((self.func, frozenset(self.keywords.items())))
