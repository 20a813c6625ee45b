"""Faults of rows, with place and remedy, and counted.

A `Place` is an origin and a path into the row (`train.jsonl:17: messages[2].content`); the reader of a value carries
its place along, so every complaint names file, line and field. `Rejects` decides what a complaint does: stop, or count.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from whet.data.base import Origin
from whet.errors import DataError

REASONS = 5
"""How many reasons for dropping rows are said, the most frequent first."""


class BadRow(DataError):
    """One row cannot be used: `origin: field: what; remedy`.

    `what` is the same for every row with the same fault, so that `reason` can be counted; numbers and values
    of this one row belong into `remedy`. `droppable`: the message advises `on_bad_row: drop`; the `fault` that is kept
    of a dropped row does not.
    """

    def __init__(
        self, origin: Origin | str, field: str, what: str, remedy: str = "", *, droppable: bool = False
    ) -> None:
        self.origin, self.fault = origin, f"{field}: {what}" if field else what
        self.reason = re.sub(r"\[\d+\]", "[]", self.fault)
        self.fault += f"; {remedy}" if remedy else ""
        super().__init__(f"{origin}: {self.fault}{', or set data.on_bad_row: drop' if droppable else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: by its text, not by what that was made of."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class LeftOut(BadRow):
    """A sound row that is no example of what is asked for (a tie between two answers): counted, never an error."""


@dataclass(frozen=True, slots=True)
class Place:
    """A field of a row; `place[key]` is a field or an item inside it."""

    origin: Origin
    field: str = ""

    def __getitem__(self, key: str | int) -> Place:
        if isinstance(key, int):
            return Place(self.origin, f"{self.field}[{key}]")
        return Place(self.origin, f"{self.field}.{key}" if self.field else key)

    def bad(self, what: str, remedy: str = "") -> BadRow:
        """The complaint about this field, to be raised."""
        return BadRow(self.origin, self.field, what, remedy)

    def left_out(self, what: str) -> LeftOut:
        """Why this row is passed over, to be raised."""
        return LeftOut(self.origin, self.field, what)


@dataclass(frozen=True, slots=True)
class Lost:
    """One row that was left out."""

    row: Origin | str
    reason: str
    """The same for every row with the same fault."""
    fault: str
    """The complaint in full."""

    def __str__(self) -> str:
        return f"{self.row}: {self.fault}"


@dataclass(frozen=True, slots=True)
class Dropped:
    """The rows that were left out, in order, and why."""

    rows: tuple[Lost, ...] = ()
    unread: Mapping[str, int] = field(default_factory=dict)
    """Columns that nothing reads, and how many rows have each."""

    @property
    def any(self) -> bool:
        """Whether there is something to say."""
        return bool(self.rows or self.unread)

    @property
    def total(self) -> int:
        """Rows left out."""
        return len(self.rows)

    @property
    def counts(self) -> Counter[str]:
        """Rows for each reason."""
        return Counter(lost.reason for lost in self.rows)

    def describe(self) -> str:
        """`3 rows dropped: 2 x messages[].content: is empty; ... (first: train.jsonl:17: ...)`."""
        parts = []
        if self.rows:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in self.counts.most_common(REASONS))
            rows = f"{self.total} {'row' if self.total == 1 else 'rows'}"
            parts.append(f"{rows} dropped: {reasons} (first: {self.rows[0]})")
        if self.unread:
            counted = (f"{name} ({n:,} row{'s' * (n > 1)})" for name, n in Counter(self.unread).most_common())
            parts.append(f"not read: {', '.join(counted)}")
        return "; ".join(parts) or "no rows dropped"


class Rejects:
    """Takes bad rows: raises the first one (`error`), or keeps its place (`drop`); what is `LeftOut` it only keeps."""

    def __init__(self, on_bad_row: Literal["error", "drop"], *, keeps_columns: bool = False) -> None:
        """`keeps_columns`: what a reader does not read goes on to rewards."""
        self._raise, self.keeps_columns = on_bad_row == "error", keeps_columns
        self._lost: list[Lost] = []
        self.unread: Counter[str] = Counter()
        """Columns that nothing reads, and how many rows had each so far."""

    def add(self, bad: BadRow) -> None:
        """Raise or keep this row."""
        if self._raise and not isinstance(bad, LeftOut):
            raise bad
        self._lost.append(Lost(bad.origin, bad.reason, bad.fault))

    @property
    def dropped(self) -> Dropped:
        """What was left out so far."""
        return Dropped(tuple(self._lost), dict(self.unread))


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a misspelled name: `did you mean 'question'?`, or the names that there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"


def finite(value: Any, place: Place, remedy: str = "write one, or leave the column out") -> float:
    """A number that 64 bits hold, and no other thing that could be made one. Raises `BadRow`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise place.bad("not a finite number", f"it is {kind_of(value)}; {remedy}")
    return float(value)


def kind_of(value: Any) -> str:
    """A value's kind in words, with a short piece of it: `a number (3)`."""
    if value is None:
        return "missing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    shown = repr(value)
    return f"{names.get(type(value), type(value).__name__)} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
