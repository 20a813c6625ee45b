"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for it
    from rich.table import Table


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A name and numbers in every row; nothing is read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def evaluation_table(evaluation: Mapping[str, Any], label: str = "model") -> Table:
    """The rows of `eval.json`: accuracy and paired gain with their 95 % intervals, lengths, and rewards if several.

    Of held-out losses: nats for each trained token, with the paired change.
    """
    rows = evaluation["rows"]
    if "k" not in evaluation:
        losses = (
            (r["label"], *_of(r, "loss", ".3f"), *_of(r, "change", "+.3f"), f"{r['perplexity']:.4g}") for r in rows
        )
        return plain_table((label, "loss", "95 %", "change", "95 %", "perplexity"), losses)
    rewards = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    rewards = rewards if len(rewards) > 1 else []  # one alone is the accuracy
    shown = []
    for row in rows:
        gain = ("", "")
        if row["gain"] is not None:
            gain = (f"{100 * row['gain']:+.1f}", f"{100 * row['gain_low']:+.1f} to {100 * row['gain_high']:+.1f}")
        means = (f"{row['rewards'][name]:.3f}" if name in row["rewards"] else "" for name in rewards)
        shown.append((row["label"], *_of(row, "accuracy", ".1%"), *gain, f"{row['mean_length']:.1f}", *means))
    return plain_table((label, "accuracy", "95 %", "gain", "95 %", "tokens", *rewards), shown)


def _of(row: Mapping[str, Any], name: str, form: str) -> tuple[str, str]:
    """A figure and its interval; empty where there is none."""
    low, high = (row.get(f"{name}_{end}", row[end]) for end in ("low", "high"))
    return ("", "") if row[name] is None else (f"{row[name]:{form}}", f"{low:{form}} to {high:{form}}")
