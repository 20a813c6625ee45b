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


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """The rows of `eval.json`: accuracy and paired gain with their 95 % intervals, lengths, and rewards if several.

    Of `perplexity.json`: nats for each trained token, with the paired difference.
    """
    if "k" not in evaluation:
        return _losses(evaluation["rows"])
    rewards = list(dict.fromkeys(name for row in evaluation["rows"] for name in row["rewards"]))
    rewards = rewards if len(rewards) > 1 else []  # one alone is the accuracy
    rows = []
    for row in evaluation["rows"]:
        gain = ("", "")
        if row["gain"] is not None:
            gain = (f"{100 * row['gain']:+.1f}", f"{100 * row['gain_low']:+.1f} to {100 * row['gain_high']:+.1f}")
        accuracy = (f"{row['accuracy']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}")
        means = (f"{row['rewards'][name]:.3f}" if name in row["rewards"] else "" for name in rewards)
        rows.append((row["label"], *accuracy, *gain, f"{row['mean_length']:.1f}", *means))
    return plain_table(("model", "accuracy", "95 %", "gain", "95 %", "tokens", *rewards), rows)


def interval(at: Mapping[str, Any] | None, form: str) -> tuple[str, str]:
    """A mean and its interval; empty where there is none."""
    if at is None:
        return "", ""
    return format(at["mean"], form), f"{at['low']:{form}} to {at['high']:{form}}"


def _losses(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = (
        (
            row["label"],
            *interval({**row, "mean": row["loss"]}, ".3f"),
            *interval(row["change"], "+.3f"),
            f"{row['perplexity']:.4g}",
        )
        for row in rows
    )
    table = plain_table(("model", "loss", "95 %", "change", "95 %", "perplexity"), shown)
    table.caption = f"nats a token; {rows[0]['rows']:,} rows, {rows[0]['tokens']:,} trained tokens"
    return table
