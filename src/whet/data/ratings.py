"""Rows that rate an answer by several objectives, each on its own: HelpSteer's attributes, UltraFeedback's aspects.

| columns                                   | becomes                                                     |
|-------------------------------------------|-------------------------------------------------------------|
| ratings: {objective: number}, beside any  | its last turn, rated; null or an absent name: not rated, so |
| conversation of `formats`                 | it counts for nothing (never a zero); ratings by what is no |
|                                           | objective of the stage are left unread, and named           |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from whet.config import DataConfig
from whet.data.base import Rated, Row
from whet.data.columns import rename
from whet.data.faults import Dropped, Place, finite, kind_of, nearest
from whet.data.formats import conversation_of
from whet.data.known import RATINGS
from whet.data.messages import read_tools, refuse_settings
from whet.data.sources import read_examples
from whet.data.turns import untrained, with_system


def load_rated(config: DataConfig, objectives: Sequence[str]) -> tuple[list[Rated], Dropped]:
    """All rated answers of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, partial(to_rated, objectives=objectives), RATINGS)


def to_rated(row: Row, config: DataConfig, *, objectives: Sequence[str]) -> Rated:
    """A row as one answer with its ratings. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    messages = with_system(conversation_of(columns, config, place), columns, config, place)
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise place.bad("no answer to rate", "the last message must be the assistant's, after a prompt")
    refuse_settings(columns, place)
    return Rated(
        origin=row.origin,
        prompt=untrained(messages[:-1]),
        answer=messages[-1:],
        ratings=_ratings(columns, objectives, place),
        unread=_others(columns["ratings"], objectives),
        tools=read_tools(columns, place),
    )


def _ratings(columns: Mapping[str, Any], objectives: Sequence[str], place: Place) -> dict[str, float]:
    """The ratings by objectives of the recipe, each a finite number; others are left unread."""
    listed, place = columns.get("ratings"), place["ratings"]
    if listed is None:
        raise place.bad("no ratings", f"there are: {', '.join(columns)}; name yours in data.columns.ratings")
    if not isinstance(listed, dict):
        raise place.bad("not an object", f"it is {kind_of(listed)}; write {{'{objectives[0]}': 3, ...}}")
    given = {name: listed[name] for name in objectives if listed.get(name) is not None}
    if not given:
        others = _others(listed, objectives)
        remedy = f"it is rated by others, {nearest(objectives[0], others)}" if others else "give one, or leave it out"
        raise place.bad("not one rating by the stage's objectives", remedy)
    return {name: finite(value, place[name], "null means no rating") for name, value in given.items()}


def _others(listed: Mapping[str, Any], objectives: Sequence[str]) -> tuple[str, ...]:
    """What else the answer is rated by."""
    return tuple(name for name, value in listed.items() if value is not None and name not in objectives)
