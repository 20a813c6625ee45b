"""`data.columns`: the user's column names to ours, or a text built from several columns."""

from __future__ import annotations

import string
from functools import lru_cache
from typing import Any

from whet.config import DataConfig
from whet.data.base import Row
from whet.data.faults import Place, kind_of, nearest
from whet.errors import DataError


def rename(row: Row, config: DataConfig) -> dict[str, Any]:
    """The row's columns, with those of `config.columns` added under our names; the originals stay.

    An entry is the name of a column or a text with `{column}` in it (`{{` and `}}` are braces). Raises `BadRow`
    where the row has no such column.
    """
    named = {ours: _value(row, Place(row.origin, ours), entry) for ours, entry in config.columns.items()}
    return {**row.values, **named}


def _value(row: Row, place: Place, entry: str) -> Any:
    if entry in row.values:
        return row.values[entry]
    if "{" not in entry:
        raise place.bad(f"no column {entry!r}", nearest(entry, row.values))
    return "".join(literal + _text(row, place, column) for literal, column in _pieces(entry))


def _text(row: Row, place: Place, column: str | None) -> str:
    if column is None:
        return ""
    if column not in row.values:
        raise place.bad(f"no column {column!r}", f"{nearest(column, row.values)} Write {{{{ and }}}} for plain braces")
    value = row.values[column]
    if not isinstance(value, (str, int, float)):
        raise place.bad(f"column {column!r} cannot stand in a text", f"it is {kind_of(value)}")
    return str(value)


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
