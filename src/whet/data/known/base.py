"""How a data set is known by its columns, and its rows are made into ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from whet.config import DataConfig
from whet.data.base import Row
from whet.data.columns import column_of, leads
from whet.data.faults import Place, kind_of
from whet.data.turns import text_of

Columns = Mapping[str, Any]

Known = Mapping[tuple[str, ...], Callable[[Columns, Place], Columns | Iterable[Columns]]]
"""Paths that lead somewhere in the rows of a data set, and how to write such a row with our columns: as one or more."""


def unfold(row: Row, config: DataConfig, known: Known) -> list[Row]:
    """The row itself, or what it holds where it is of a known data set. Raises `BadRow` where it is damaged."""
    place = Place(row.origin)
    if config.columns or config.format != "auto":
        return [row]
    for paths in _possible(frozenset(row.values), tuple(known)):
        if all(leads(row.values, path, place) for path in paths):
            found = known[paths](row.values, place)
            parts = [found] if isinstance(found, Mapping) else found
            made = [replace(row, values={**row.values, **columns}) for columns in parts]
            if len(made) == 1:
                return made
            return [replace(each, origin=replace(row.origin, part=part)) for part, each in enumerate(made, start=1)]
    return [row]


@lru_cache  # asked for every row
def _possible(columns: frozenset[str], known: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    return [paths for paths in known if columns.issuperset(map(column_of, paths))]


def helpsteer_prompt(columns: Columns, place: Place) -> list[Columns]:
    """HelpSteer's prompt as messages: each but the first begins with `<extra_id_1>User` or `<extra_id_1>Assistant`."""
    first, *others = re.split(r"\n<extra_id_1>(Assistant|User)\n", text_of(columns, "prompt", place))
    spoken = [("User", first), *zip(others[::2], others[1::2], strict=True)]
    return [{"role": who.lower(), "content": text} for who, text in spoken]


def one_of(value: Any, values: tuple[Any, ...], place: Place) -> Any:
    """The value, which must be one of those. Raises `BadRow`."""
    if isinstance(value, bool) or value not in values:
        raise place.bad(f"none of {', '.join(map(str, values))}", f"it is {kind_of(value)}")
    return value
