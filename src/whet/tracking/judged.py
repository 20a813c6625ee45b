"""How good a reward model or a judge was found to be (`reward.json`), made ready for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.tracking.svg import interval
from whet.tracking.text import number, percent, points

RULES = {"pairs": "the longer one is better", "labels": "always the more frequent label"}
"""What a reward model must beat, by what it was judged on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgementView:
    """The section of one stage."""

    stage: str
    who: str
    """reward model or judge."""
    what: str
    lead: str
    measure: str
    """What the share of a row is a share of."""
    rows: list[tuple[str, float, float, float, str]]
    """(label, share, low, high, drawing) of the model and of what it must beat, or of each objective."""
    bins: Sequence[Mapping[str, float]]
    note: str
    """What else is to be known of it."""


def judged(stage: str, found: Mapping[str, Any]) -> JudgementView | None:
    """The section for what a stage's `reward.json` says; None where it says nothing."""
    if not found:
        return None
    if found["what"] == "ratings":
        return _ratings(stage, found)
    who = "judge" if "order_flips" in found else "reward model"
    held_out = "" if who == "judge" else "held-out "
    named = [(who, found["accuracy"], "blue"), (RULES[found["what"]], found["baseline"], "grey")]
    for name, rival in found.get("rivals", {}).items():
        low, high = points(rival["gain"]["low"]), points(rival["gain"]["high"])
        named.append((f"{name} (gain over it {low} to {high})", rival["accuracy"], "grey"))
    return JudgementView(
        stage=stage,
        who=who,
        what=found["what"],
        lead=f"{found['count']:,} {held_out}{found['what']} of {found['accuracy']['questions']:,} prompts.",
        measure="right",
        rows=[_row(label, share, tone) for label, share, tone in named],
        bins=found["bins"],
        note=f"{_note(found)} Intervals treat the prompt as the unit. Expected calibration error "
        f"{number(found['calibration_error'])}: the mean distance of the last two columns, weighed by counts.",
    )


def _ratings(stage: str, found: Mapping[str, Any]) -> JudgementView:
    """Of a model of several objectives."""
    with_length = (
        f"{each['name']} {number(each['length'])} ({number(each['length_of_ratings'])})"
        for each in found["objectives"]
        if each["length"] is not None and each["length_of_ratings"] is not None
    )
    return JudgementView(
        stage=stage,
        who="reward model",
        what="ratings",
        lead=f"{found['count']:,} held-out ratings.",
        measure="of the variance explained",
        rows=[_row(each["name"], each["explained"], "blue") for each in found["objectives"]],
        bins=(),
        note="The mean rating of the training data explains 0 %. Intervals treat the prompt as the unit. "
        f"Correlation of scores (of the ratings themselves) with the answer's length: {', '.join(with_length)}.",
    )


def _row(label: str, share: Mapping[str, float], tone: str) -> tuple[str, float, float, float, str]:
    low, mean, high = share["low"], share["mean"], share["high"]
    return label, mean, low, high, interval(low, mean, high, start=0.0, stop=1.0, zero=None, tone=tone)


def _note(found: Mapping[str, Any]) -> str:
    ties = percent(found["ties"], 1)
    if "order_flips" not in found:
        return f"Ties ({ties}) count as wrong."
    flips, failed, unparsed = (percent(found[name], 1) for name in ("order_flips", "failed", "unparsed"))
    return (
        f"Ties ({ties}) count as half right, and so do pairs whose two orders disagree ({flips}). Without a verdict: "
        f"{failed} of all pairs, as far as {unparsed} because none could be read."
    )
