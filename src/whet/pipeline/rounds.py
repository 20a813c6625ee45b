"""How far a loop of stages goes: what its rule makes of the evaluations of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whet.config.loops import LoopConfig
from whet.errors import ConfigError
from whet.files import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How far a loop goes."""

    last: int = 0
    best: int = 0
    """The one that it ended with: the best by its rule, or the last where it has none."""
    why: str = ""
    """Why it stops before all rounds are run."""


def rounds_of(tables: Sequence[Path], config: LoopConfig) -> Rounds:
    """What the rule of a loop makes of the evaluations (`eval.json`) of its rounds until now."""
    until, best, scores = config.until, 0, list[float]()
    for number, table in enumerate(tables, start=1):
        assert until is not None
        row = read_json(table)["rows"][-1]
        known = {"accuracy": row["accuracy"], **row["rewards"]}
        if until.metric not in known:
            raise ConfigError(f"until.metric is {until.metric!r}, and {table} has {', '.join(known)}")
        scores.append(known[until.metric])
        best = number if best == 0 or scores[-1] > scores[best - 1] + until.min_gain else best
        now = f"{until.metric} {scores[-1]:.3f}"
        if until.reach is not None and scores[-1] >= until.reach:
            return Rounds(last=number, best=number, why=f"{now} reaches {until.reach:g}")
        if until.patience is not None and number - best >= until.patience:
            return Rounds(last=number, best=best, why=f"{now} is no better than {scores[best - 1]:.3f} of round {best}")
    return Rounds(last=config.repeat, best=best or config.repeat)
