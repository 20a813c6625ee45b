"""Held-out loss: how many nats a trained token costs each model, row by row. The unit of every interval is the row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from whet.evals.stats import Interval, ratio_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLoss:
    """One row under one model."""

    nll: float
    """Sum over its trained tokens, in nats."""
    tokens: int


def table(losses: Mapping[str, Sequence[RowLoss]], baseline: str | None = None) -> dict[str, Any]:
    """The content of `perplexity.json`: a row for each model, and its difference to the baseline (None: the first)."""
    first = baseline or next(iter(losses))
    rows = []
    for label, given in losses.items():
        loss = ratio_interval([row.nll for row in given], [row.tokens for row in given])
        rows.append(
            {
                "label": label,
                "loss": loss.mean,
                "low": loss.low,
                "high": loss.high,
                "perplexity": math.exp(min(loss.mean, 700.0)),
                "rows": len(given),
                "tokens": sum(row.tokens for row in given),
                "change": None if label == first or (d := change(losses[first], given)) is None else asdict(d),
            }
        )
    return {"rows": rows}


def change(before: Sequence[RowLoss], after: Sequence[RowLoss]) -> Interval | None:
    """Loss of the second model minus the first's on the same rows; None where they cut them into other tokens."""
    counts = [row.tokens for row in before]
    if counts != [row.tokens for row in after]:
        return None
    return ratio_interval([b.nll - a.nll for a, b in zip(before, after, strict=True)], counts)
