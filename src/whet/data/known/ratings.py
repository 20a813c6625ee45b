"""Data sets that rate an answer by several objectives.

| data set                | known by                                     | becomes                                    |
|-------------------------|----------------------------------------------|--------------------------------------------|
| HelpSteer, HelpSteer2   | prompt, response, helpfulness, correctness,  | an answer with its five ratings            |
|                         | coherence, complexity, verbosity             |                                            |
| UltraFeedback           | instruction, completions[].response,         | each answer with its four, those in        |
|                         | completions[].annotations                    | annotations.*.Rating; N/A is no rating     |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from whet.data.columns import pick
from whet.data.faults import Place, kind_of
from whet.data.known.base import Columns, Known, helpsteer_prompt

_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _helpsteer(columns: Columns, place: Place) -> Iterator[Columns]:
    ratings = {name: columns[name] for name in _ATTRIBUTES}
    yield {"prompt": helpsteer_prompt(columns, place), "completion": columns["response"], "ratings": ratings}


def _ultrafeedback(columns: Columns, place: Place) -> Iterator[Columns]:
    answers = pick(columns, "completions[].response", place)
    for index, aspects in enumerate(pick(columns, "completions[].annotations", place)):
        at = place["completions"][index]["annotations"]
        if not isinstance(aspects, dict):
            raise at.bad("no ratings by aspect", f"it is {kind_of(aspects)}")
        ratings = {name: _rating(pick(aspects, f"{name}.Rating", at), at[name]["Rating"]) for name in aspects}
        yield {"prompt": columns["instruction"], "completion": answers[index], "ratings": ratings}


def _rating(value: Any, place: Place) -> Any:
    """UltraFeedback writes its numbers as texts."""
    if not isinstance(value, str):
        return value
    try:
        return None if value == "N/A" else float(value)
    except ValueError as error:
        raise place.bad("not a rating", f"it is {kind_of(value)}; write a number, or N/A") from error


RATINGS: Known = {
    ("prompt", "response", *_ATTRIBUTES): _helpsteer,
    ("instruction", "completions[].response", "completions[].annotations"): _ultrafeedback,
}
