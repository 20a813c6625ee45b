"""Rows that say which answer is better, or how good one is: comparisons, answers called good or bad, ratings.

| format            | columns                                                    | becomes                             |
|-------------------|------------------------------------------------------------|-------------------------------------|
| pair              | chosen, rejected: texts, messages or one message each      | two answers, the chosen one first   |
| openai_preference | input: {messages}, preferred_output, non_preferred_output  | the same                            |
| ranked            | prompt, answers, and ranks (1 is best) or scores           | the answers, the best first         |
| judged            | label: true or false, beside any conversation of `formats` | its last turn, called good or bad   |
| rated             | ratings: {objective: number}, beside any conversation      | its last turn, rated                |

Any comparison is also two judged answers: its best is good, its worst is bad. Of ratings null or an absent name means
not rated, so it counts for nothing (never a zero); ratings by what is no objective of the stage are unread, and named.

The prompt of a pair stands in `prompt`, `conversations`, `messages` or `instruction` (`input`, `history`); else it is
what the two have in common: leading messages, turns of an HH-RLHF transcript, or the beginning of the text.
Columns beside them: `system`, `tools`, and for two answers `margin` and `confidence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from whet.config import DataConfig
from whet.data.base import Comparison, Judged, Rated, Row
from whet.data.columns import rename
from whet.data.faults import Dropped, Place, finite, kind_of, nearest
from whet.data.formats import conversation_of
from whet.data.known import ANSWERS, RATINGS
from whet.data.messages import read_settings, read_tools
from whet.data.pairs import Turns, asked_format, compared, format_of, same
from whet.data.sources import read_examples
from whet.data.turns import untrained, with_system


def load_comparisons(config: DataConfig) -> tuple[list[Comparison], Dropped]:
    """All comparisons of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_comparison, ANSWERS)


def load_judged(config: DataConfig) -> tuple[list[Judged], Dropped]:
    """The judged answers of all rows, up to `limit` rows, and what was left out; raises as `load_comparisons` does."""
    rows, dropped = read_examples(config, to_judged, ANSWERS)
    return [answer for row in rows for answer in row], dropped


def to_comparison(row: Row, config: DataConfig) -> Comparison:
    """A row as answers in order of preference. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    prompt, answers, tied = compared(columns, asked_format(columns, config, place), place)
    if answers[0] == answers[1]:
        raise same(columns, place)
    margin = _number(columns, "margin", place)
    confidence = _number(columns, "confidence", place)
    if len(answers) > 2 and (margin is not None or confidence is not None):
        raise place.bad("margin and confidence are for two answers", f"this row has {len(answers)}")
    if confidence is not None and not 0 <= confidence <= 1:
        raise place["confidence"].bad("not a probability", f"it is {kind_of(confidence)}; it lies between 0 and 1")
    return Comparison(
        origin=row.origin,
        prompt=untrained(with_system(prompt, columns, config, place)),
        answers=answers,
        tools=read_tools(columns, place),
        settings=read_settings(columns, place),
        margin=margin,
        confidence=1.0 if confidence is None else confidence,
        tied=tied,
    )


def to_judged(row: Row, config: DataConfig) -> tuple[Judged, ...]:
    """A row as an answer that is good or bad; or as two, the best and the worst of a comparison without a `label`.

    Raises `BadRow` naming file, line, field, fault and remedy.
    """
    columns = rename(row, config)
    if columns.get("label") is None and format_of(columns) is not None:
        return _unpaired(to_comparison(row, config))
    place = Place(row.origin)
    messages, given = _answered(columns, config, place, "judge")
    prompt, good = untrained(messages[:-1]), _label(columns, place)
    return (Judged(origin=row.origin, prompt=prompt, answer=messages[-1:], good=good, **given),)


def _answered(
    columns: Mapping[str, Any], config: DataConfig, place: Place, purpose: str
) -> tuple[Turns, dict[str, Any]]:
    """The messages of a row that end with an answer, and its tools and template settings. Raises `BadRow`."""
    messages = with_system(conversation_of(columns, config, place), columns, config, place)
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise place.bad(f"no answer to {purpose}", "the last message must be the assistant's, after a prompt")
    return messages, {"tools": read_tools(columns, place), "settings": read_settings(columns, place)}


def _label(columns: Mapping[str, Any], place: Place) -> bool:
    if "label" not in columns:
        raise place["label"].bad("no label", f"there are: {', '.join(columns)}; name yours in data.columns.label")
    label = columns["label"]
    if label is None:
        raise place["label"].bad("is null", "write true for a good answer and false for a bad one")
    if label not in (0, 1) or isinstance(label, float):
        raise place["label"].bad(
            "neither true nor false", f"it is {kind_of(label)}; write true for a good answer and false for a bad one"
        )
    return bool(label)


def _unpaired(comparison: Comparison) -> tuple[Judged, Judged]:
    """The best and the worst answer, as TRL makes two rows of a pair. Margin and confidence mean nothing to them."""
    left_out = len(comparison.answers) - 2 + comparison.tied
    best, worst = (
        Judged(
            origin=comparison.origin,
            prompt=comparison.prompt,
            answer=answer,
            tools=comparison.tools,
            settings=comparison.settings,
            good=good,
        )
        for answer, good in ((comparison.answers[0], True), (comparison.answers[-1], False))
    )
    return best, replace(worst, left_out=left_out)


def _number(columns: Mapping[str, Any], name: str, place: Place) -> float | None:
    return None if columns.get(name) is None else finite(columns[name], place[name])


def load_rated(config: DataConfig, objectives: Sequence[str]) -> tuple[list[Rated], Dropped]:
    """All rated answers of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, partial(to_rated, objectives=objectives), RATINGS)


def to_rated(row: Row, config: DataConfig, *, objectives: Sequence[str]) -> Rated:
    """A row as one answer with its ratings. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    messages, given = _answered(columns, config, place, "rate")
    return Rated(
        origin=row.origin,
        prompt=untrained(messages[:-1]),
        answer=messages[-1:],
        ratings=_ratings(columns, objectives, place),
        unread=_others(columns["ratings"], objectives),
        **given,
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
