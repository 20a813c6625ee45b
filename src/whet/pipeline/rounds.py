"""How far a loop of stages goes: what its rule makes of the evaluations of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whet.config.loops import UntilConfig
from whet.errors import ConfigError
from whet.files import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How far a loop goes."""

    last: int
    best: int
    """The one that it ended with: the best by its rule, or the last where it has none."""
    why: str = ""
    """Why it stops before all rounds are run."""


def best_of(scores: Sequence[float], until: UntilConfig) -> int:
    """The round (from 1) that no later one beat by more than `min_gain`."""
    best = 0
    for index, score in enumerate(scores):
        best = index if score > scores[best] + until.min_gain else best
    return best + 1


def stops(scores: Sequence[float], until: UntilConfig) -> str:
    """Why a loop with these scores is over; empty: it goes on."""
    best, shown = best_of(scores, until), f"{until.metric} {scores[-1]:.3f}"
    if until.reach is not None and scores[-1] >= until.reach:
        return f"{shown} reaches {until.reach:g}"
    if until.patience is not None and len(scores) - best >= until.patience:
        return f"{shown} is no better than {scores[best - 1]:.3f} of round {best}"
    return ""


def score_of(folder: Path, metric: str) -> float:
    """What the last model of an evaluation has."""
    row = read_json(folder / "eval.json")["rows"][-1]
    known = {"accuracy": row["accuracy"], **row["rewards"]}
    if metric not in known:
        raise ConfigError(f"{folder.name}: until.metric is {metric!r}; the evaluation has {', '.join(known)}")
    return float(known[metric])
