"""Lists of answers with ranks or scores: `prompt`, `answers`, and `ranks` (1 is best) or `scores`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whet.data.faults import Place, finite, kind_of
from whet.data.messages import parse_message, parse_messages
from whet.data.turns import filled
from whet.records import Message

Turns = tuple[Message, ...]


def in_order(columns: Mapping[str, Any], place: Place) -> tuple[tuple[Turns, ...], int]:
    """The answers, the best first and the first of equally good ones, and how many were tied. Raises `BadRow`."""
    listed, at = columns["answers"], place["answers"]
    if not isinstance(listed, list) or not listed:
        raise at.bad("not a list of answers", f"it is {kind_of(listed)}")
    answers = [answer_of(answer, at[index]) for index, answer in enumerate(listed)]
    if len(answers) == 1:
        return tuple(answers), 0
    best: dict[float, Turns] = {}
    for key, answer in sorted(zip(_order(columns, len(answers), place), answers, strict=True), key=lambda it: it[0]):
        if answer in best.values():
            raise at.bad("two answers are the same", "leave one of them out")
        best.setdefault(key, answer)
    return tuple(best.values()), len(answers) - len(best)


def answer_of(value: Any, place: Place) -> Turns:
    """An answer as text, as one message or as a list of them."""
    if value is None:
        raise place.bad("no answer", "a comparison needs both; fill it in or leave the row out")
    if isinstance(value, dict):
        return (parse_message(value, place),)
    if isinstance(value, list):
        return parse_messages(value, place)
    return (Message(role="assistant", content=filled(value, place)),)


def _order(columns: Mapping[str, Any], count: int, place: Place) -> list[float]:
    """A number for each answer, lower for better."""
    found = [name for name in ("ranks", "scores") if columns.get(name) is not None]
    if len(found) != 1:
        which = "both ranks and scores" if found else "neither ranks nor scores"
        raise place.bad(f"{which}", "give ranks (1 is the best) or scores (the highest is the best)")
    (name,) = found
    values = columns[name]
    if not isinstance(values, list) or len(values) != count:
        raise place[name].bad("not one number for each answer", f"it is {kind_of(values)} for {count} answers")
    numbers = [finite(value, place[name][index]) for index, value in enumerate(values)]
    return numbers if name == "ranks" else [-number for number in numbers]
