"""How good a reward model or a judge was found to be (`reward.json`), made ready for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.tracking.svg import interval
from whet.tracking.text import percent

RULES = {"pairs": "the longer one is better", "labels": "always the more frequent label"}
"""What a reward model must beat, by what it was judged on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The section of one stage."""

    stage: str
    who: str
    """reward model or judge."""
    what: str
    count: int
    questions: int
    note: str
    """What else is to be known of it."""
    calibration_error: float
    rows: list[tuple[str, float, float, float, str]]
    """(label, share right, low, high, drawing) of the model and of the rule."""
    bins: Sequence[Mapping[str, float]]


def judged(stage: str, found: Mapping[str, Any]) -> Judged | None:
    """The section for what a stage's `reward.json` says; None where it says nothing."""
    if not found:
        return None
    drawn = []
    who = "judge" if "order_flips" in found else "reward model"
    named = ((who, found["accuracy"], "blue"), (RULES[found["what"]], found["baseline"], "grey"))
    for label, share, tone in named:
        low, mean, high = share["low"], share["mean"], share["high"]
        plot = interval(low, mean, high, start=0.0, stop=1.0, zero=None, tone=tone)
        drawn.append((label, mean, low, high, plot))
    return Judged(
        stage=stage,
        who=who,
        what=found["what"],
        count=found["count"],
        questions=found["accuracy"]["questions"],
        note=_note(found),
        calibration_error=found["calibration_error"],
        rows=drawn,
        bins=found["bins"],
    )


def _note(found: Mapping[str, Any]) -> str:
    ties = percent(found["ties"], 1)
    if "order_flips" not in found:
        return f"Ties ({ties}) count as wrong."
    flips, failed, unparsed = (percent(found[name], 1) for name in ("order_flips", "failed", "unparsed"))
    return (
        f"Ties ({ties}) count as half right, and so do pairs whose two orders disagree ({flips}). Without a verdict: "
        f"{failed} of all pairs, as far as {unparsed} because none could be read."
    )
