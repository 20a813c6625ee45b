"""`data.columns`: the user's column names to ours, paths to what is inside of columns, and texts built from several."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from whet.config import DataConfig
from whet.data.base import Row
from whet.data.faults import BadRow, Place, kind_of, nearest
from whet.errors import DataError

SPELLINGS = {"chosen_messages": "chosen", "rejected_messages": "rejected"}
"""Another name (LLaMA-Factory's) for one of ours."""


def rename(row: Row, config: DataConfig) -> dict[str, Any]:
    """The row's columns, with those of `config.columns` added under our names; the originals stay.

    An entry is the name of a column, a path into one (`completions[].response`, `choices[0].message.content`), or a
    text with `{column}` in it (`{{` and `}}` are braces). Raises `BadRow` where the row has no such column.
    """
    named = {ours: _value(row, Place(row.origin, ours), entry) for ours, entry in config.columns.items()}
    spelled = {ours: row.values[theirs] for theirs, ours in SPELLINGS.items() if theirs in row.values}
    return {**spelled, **row.values, **named}


def pick(values: Mapping[str, Any], path: str, place: Place) -> Any:
    """What stands at a path: `a.b` is a key, `a[0]` an item, and `a[].b` a list, the same of every item.

    Raises `BadRow` naming the field where the path ends, and `DataError` for what is no path.
    """
    return _walk(values, _steps(path), place)


def leads(values: Mapping[str, Any], path: str, place: Place) -> bool:
    """Whether there is anything at a path; of a list its first item is looked at."""
    try:
        pick(values, path.replace("[]", "[0]"), place)
    except BadRow:
        return False
    return True


def column_of(path: str) -> str:
    """The column in which a path begins."""
    return str(_steps(path)[0])


def _value(row: Row, place: Place, entry: str) -> Any:
    if entry not in row.values and "{" in entry:
        return "".join(literal + _text(row, place, column) for literal, column in _pieces(entry))
    return _column(row, place, entry)


def _text(row: Row, place: Place, column: str | None) -> str:
    if column is None:
        return ""
    value = _column(row, place, column, hint=" Write {{ and }} for plain braces")
    if not isinstance(value, (str, int, float)):
        raise place.bad(f"column {column!r} cannot stand in a text", f"it is {kind_of(value)}")
    return str(value)


def _column(row: Row, place: Place, name: str, hint: str = "") -> Any:
    """A column, or what a path finds in one. A column may well have a dot in its name."""
    if name in row.values:
        return row.values[name]
    if re.split(r"[.[]", name)[0] not in row.values:
        raise place.bad(f"no column {name!r}", nearest(name, row.values) + hint)
    return pick(row.values, name, Place(row.origin))


def _walk(value: Any, steps: tuple[str | int | None, ...], place: Place) -> Any:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, str):
        if not isinstance(value, Mapping) or step not in value:
            there = nearest(step, value) if isinstance(value, Mapping) else f"it stands in {kind_of(value)}"
            raise place[step].bad("no such field", there)
        return _walk(value[step], rest, place[step])
    if not isinstance(value, list):
        raise place.bad("not a list", f"it is {kind_of(value)}")
    if step is None:
        return [_walk(item, rest, place[index]) for index, item in enumerate(value)]
    if step >= len(value):
        raise place[step].bad("no such item", f"there are {len(value)}, counted from 0")
    return _walk(value[step], rest, place[step])


@lru_cache
def _steps(path: str) -> tuple[str | int | None, ...]:
    """`"a[].b[0]"` as `("a", None, "b", 0)`."""
    found = re.findall(r"\.?([^.\[\]]+)|\[(\d*)\]", path)
    if "".join(f".{key}" if key else f"[{item}]" for key, item in found) != f".{path}":
        raise DataError(f"data.columns: {path!r} is no path; write column.key, column[0].key or column[].key")
    return tuple(key or (int(item) if item else None) for key, item in found)


@lru_cache
def _pieces(entry: str) -> tuple[tuple[str, str | None], ...]:
    """`"Q: {q}!"` as `(("Q: ", "q"), ("!", None))`."""
    try:
        parsed = list(string.Formatter().parse(entry))
    except ValueError as error:
        raise DataError(f"data.columns: {entry!r}: {error}; write {{{{ and }}}} for plain braces") from error
    for _, column, form, conversion in parsed:
        if form or conversion or column == "":
            raise DataError(f"data.columns: {entry!r}: only {{column}} may stand in braces, without : or !")
    return tuple((literal, column) for literal, column, _, _ in parsed)
