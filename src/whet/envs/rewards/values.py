r"""What an answer is: the typed values that golds and answers are read into.

    read("8 centimeters")        Number(exact=8, unit=cm)      read("x \in [1, 2)")     Region
    read("\frac{\sqrt{2}}{2}")   Formula                       read("(1, 2)")           Items(kind="tuple")
    read("B) 42")                Choice                        read("2025-01-02")       Date
    read("y = 2x + 1")           Named("y", Formula)           read("silent")           Text

`reader.read` reads both. A gold answer is read once, when the rows are loaded; its type decides which rules of `agree`
compare it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from whet.envs.rewards.units import Unit

LONGEST = 2000
"""Characters of an answer that is read; a longer one is wrong by rule."""


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value. `places`: digits after the point, where it was written as a decimal number."""

    text: str
    exact: Fraction
    places: int | None = None
    percent: bool = False
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Formula:
    """An expression that takes algebra to compare, in the notation of `plain`."""

    text: str
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter of an option, and its words where they are given."""

    letter: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class YesNo:
    """Yes or no, true or false."""

    yes: bool


@dataclass(frozen=True, slots=True)
class Date:
    """A day of the calendar; 0 where a part is not given."""

    year: int
    month: int
    day: int


@dataclass(frozen=True, slots=True)
class Text:
    """Words: equal where the words are equal, case and punctuation aside."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """Several values: in an order (tuple, bracket) or in none (set), or as the text leaves it open (list)."""

    kind: Literal["tuple", "bracket", "set", "list"]
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval, or a point where `low == high` and both ends belong to it."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A union of intervals and points, as an interval, an inequality or a set was written."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of expressions with the relations between them that is no region: `2x + 4y = 3`, `b < a < d`."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of values."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A value with the name that it is given: `x = 3`, `f(x) = 2x`."""

    name: str
    value: Value


Value: TypeAlias = Number | Formula | Choice | YesNo | Date | Text | Items | Region | Relation | Matrix | Named
