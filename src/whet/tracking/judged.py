"""A reward model's held-out verdict (`reward.json`), made ready for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.tracking.svg import interval

RULES = {"pairs": "the longer one is better", "labels": "always the more frequent label"}
"""What a reward model must beat, by what it was judged on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The section of one stage."""

    stage: str
    what: str
    count: int
    questions: int
    ties: float
    calibration_error: float
    rows: list[tuple[str, float, float, float, str]]
    """(label, share right, low, high, drawing) of the model and of the rule."""
    bins: Sequence[Mapping[str, float]]


def judged(stage: str, found: Mapping[str, Any]) -> Judged | None:
    """The section for what a stage's `reward.json` says; None where it says nothing."""
    if not found:
        return None
    drawn = []
    named = (("reward model", found["accuracy"], "blue"), (RULES[found["what"]], found["baseline"], "grey"))
    for label, share, tone in named:
        low, mean, high = share["low"], share["mean"], share["high"]
        plot = interval(low, mean, high, start=0.0, stop=1.0, zero=None, tone=tone)
        drawn.append((label, mean, low, high, plot))
    return Judged(
        stage=stage,
        what=found["what"],
        count=found["count"],
        questions=found["accuracy"]["questions"],
        ties=found["ties"],
        calibration_error=found["calibration_error"],
        rows=drawn,
        bins=found["bins"],
    )
