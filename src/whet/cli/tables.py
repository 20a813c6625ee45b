"""An evaluation table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for it
    from rich.table import Table


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """The rows of `eval.json`: accuracy and paired gain with their 95 % intervals, lengths, and rewards if several."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    table.add_column("model", no_wrap=True)
    rewards = list(dict.fromkeys(name for row in evaluation["rows"] for name in row["rewards"]))
    rewards = rewards if len(rewards) > 1 else []  # one alone is the accuracy
    for heading in ("accuracy", "95 %", "gain", "95 %", "tokens", *rewards):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in evaluation["rows"]:
        gain = ("", "")
        if row["gain"] is not None:
            gain = (f"{100 * row['gain']:+.1f}", f"{100 * row['gain_low']:+.1f} to {100 * row['gain_high']:+.1f}")
        accuracy = (f"{row['accuracy']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}")
        means = (f"{row['rewards'][name]:.3f}" if name in row["rewards"] else "" for name in rewards)
        table.add_row(Text(row["label"]), *accuracy, *gain, f"{row['mean_length']:.1f}", *means)
    return table
