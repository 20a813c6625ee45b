"""Rated answers: what is not rated is absent, and what is no rating is named with its file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whet.config import DataConfig
from whet.data.base import Origin, Rated, Row
from whet.data.preferences import load_rated, to_rated
from whet.errors import DataError

NAMES = ("helpfulness", "verbosity")


def rated(fields: dict[str, Any] | None = None, **values: Any) -> Rated:
    row = Row(origin=Origin(source="r.jsonl", line=4), values={"prompt": "2+2?", "completion": "4", **values})
    return to_rated(row, DataConfig(path="r.jsonl", **(fields or {})), objectives=NAMES)


def test_what_nobody_rated_is_absent_and_no_zero() -> None:
    found = rated(ratings={"verbosity": 0, "helpfulness": 3.5})
    assert found.ratings == {"verbosity": 0.0, "helpfulness": 3.5}
    assert [m.content for m in found.prompt + found.answer] == ["2+2?", "4"]
    assert rated(ratings={"helpfulness": None, "verbosity": 1}).ratings == {"verbosity": 1.0}
    assert rated({"columns": {"ratings": "scores"}}, scores={"helpfulness": 2}).ratings == {"helpfulness": 2.0}


def test_ratings_by_what_is_not_asked_for_are_left_unread() -> None:
    found = rated(ratings={"verbosity": 2, "coherence": "not even a number", "complexity": None})
    assert (found.ratings, found.unread) == ({"verbosity": 2.0}, ("coherence",))


def test_any_conversation_may_be_rated() -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    row = Row(origin=Origin(source="r.jsonl", line=1), values={"messages": messages, "ratings": {"verbosity": 1}})
    assert to_rated(row, DataConfig(path="r.jsonl"), objectives=NAMES).answer[0].content == "4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "r.jsonl:4: ratings: no ratings; there are: prompt, completion"),
        ({"ratings": None}, "ratings: no ratings"),
        ({"ratings": 3}, r"ratings: not an object; it is a number \(3\); write {'helpfulness': 3"),
        ({"ratings": {}}, "ratings: not one rating"),
        ({"ratings": {"helpfulness": None}}, "ratings: not one rating"),
        ({"ratings": {"helpfulness": "4"}}, r"r.jsonl:4: ratings.helpfulness: not a finite number; it is text \('4'\)"),
        ({"ratings": {"helpfulness": True}}, "ratings.helpfulness: not a finite number"),
        ({"ratings": {"helpfulness": 10**400}}, "ratings.helpfulness: not a finite number"),
        ({"ratings": {"helpfulness": float("nan")}}, "ratings.helpfulness: not a finite number"),
        ({"ratings": {"helpfulnes": 1}}, "not one rating by .* objectives; it is rated by others, .* 'helpfulnes'?"),
        ({"completion": [{"role": "user", "content": "?"}], "ratings": {"verbosity": 1}}, "no answer to rate"),
    ],
)
def test_a_bad_row_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rated(**values)


def test_bad_rows_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "ratings": {"verbosity": value}} for value in (1, "2", 3)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(tmp_path / "r.jsonl"), on_bad_row="drop")
    found, dropped = load_rated(config, NAMES)
    assert [each.ratings["verbosity"] for each in found] == [1.0, 3.0]
    assert dropped.counts == {"ratings.verbosity: not a finite number": 1}
