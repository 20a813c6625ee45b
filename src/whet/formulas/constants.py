"""Ranges of the constants in signatures. A recipe's keys are made from those signatures: name, range, default, text.

A constant is `name: Annotated[type, range ..., "what it does"] = published default`; where no text stands, the
formula's docstring says it.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Doubt = Annotated[float, Ge(0), Lt(0.5), "Share of the labels that are taken to be the wrong way round."]
SomeDoubt = Annotated[float, Gt(0), Lt(0.5), "Share of the labels that are taken to be the wrong way round."]
Beta = Annotated[float, Gt(0), "How far the policy may go from the reference, or how sharp the contrast is."]
