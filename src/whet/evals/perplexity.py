"""Held-out loss: how many nats a trained token costs each model. The unit of every interval is the row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from whet.evals.stats import ratio_interval

RowLoss = tuple[float, int, int]
"""Of one row under one model: nats over its trained tokens, how many they are, and a checksum of all tokens."""


def loss_table(losses: Mapping[str, Sequence[RowLoss]], baseline: str | None = None) -> dict[str, Any]:
    """`rows`: one for each model, with its paired difference to the baseline (None: the
    first), which is null where the two cut the rows into other tokens."""
    first = losses[baseline or next(iter(losses))]
    rows = []
    for label, given in losses.items():
        nats, tokens = [row[0] for row in given], [row[1] for row in given]
        loss, change = ratio_interval(nats, tokens), None
        if given is not first and [row[2] for row in given] == [row[2] for row in first]:
            change = ratio_interval([row[0] - before[0] for row, before in zip(given, first, strict=True)], tokens)
        row = {"label": label, "loss": loss.mean, "low": loss.low, "high": loss.high, "rows": len(given)}
        row |= {"perplexity": math.exp(min(loss.mean, 700.0)), "tokens": int(sum(tokens))}
        row |= {"change": None if change is None else change.mean}
        rows.append(row | {f"change_{end}": change and getattr(change, end) for end in ("low", "high")})
    return {"rows": rows}
