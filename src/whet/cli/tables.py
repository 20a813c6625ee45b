"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for it
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

NEAR = 1e-3
"""A reward whose means are no further from the accuracy is the accuracy."""


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A name and numbers in every row; where a terminal is too narrow for them, a block for each row. Nothing is cut
    off, and nothing is read as markup."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        wide = _drawn(self.headings, self.rows)
        if console.measure(wide, options=options.update(width=10**4)).maximum <= options.max_width:
            yield wide
        else:
            for row in self.rows:
                cells = list(zip(self.headings, row, strict=True))
                yield _drawn(cells[0], [cell for cell in cells[1:] if cell[1]])
                yield ""


def _drawn(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> PlainTable:
    """A table of names and numbers that fits any terminal."""
    return PlainTable(headings, list(rows))


def evaluation_table(evaluation: Mapping[str, Any], label: str = "model") -> RenderableType:
    """The rows of `eval.json`: accuracy and paired gain with their 95 % intervals, and lengths.

    Below, what k answers come to (any right one, the majority's, a reward's) and the means of other rewards. Of
    held-out losses: nats for each trained token, with the paired change.
    """
    from rich.console import Group

    rows = evaluation["rows"]
    if "k" not in evaluation:
        losses = (
            (r["label"], *_of(r, "loss", ".3f"), *_of(r, "change", "+.3f"), f"{r['perplexity']:.4g}") for r in rows
        )
        return plain_table((label, "loss", "95 %", "change", "95 %", "perplexity"), losses)
    k, shown, more = str(evaluation["k"]), [], []
    for row in rows:
        gain = ("", "")
        if row["gain"] is not None:
            gain = (f"{100 * row['gain']:+.1f}", f"{100 * row['gain_low']:+.1f} to {100 * row['gain_high']:+.1f}")
        shown.append((row["label"], *_of(row, "accuracy", ".1%"), *gain, f"{row['mean_length']:.1f}"))
        found = {
            f"{name}@{k}": f"{by_k[k]:.1%}" for name, by_k in row.get("of_k", {}).items() if k != "1" and k in by_k
        }
        more.append(found | {name: f"{value:.3f}" for name, value in row["rewards"].items()})
    names = dict.fromkeys(name for each in more for name in each)
    told = [n for n in names if any(abs(row["rewards"].get(n, 2) - row["accuracy"]) > NEAR for row in rows)]
    first = plain_table((label, "accuracy", "95 %", "gain", "95 %", "tokens"), shown)
    rest = [(row["label"], *(each.get(name, "") for name in told)) for row, each in zip(rows, more, strict=True)]
    second = [(label, *told), *rest]
    if len(told) > len(rows):  # a terminal is higher than wide
        second = list(zip(*second, strict=True))
    return Group(first, "", plain_table(second[0], second[1:])) if told else first


def _of(row: Mapping[str, Any], name: str, form: str) -> tuple[str, str]:
    """A figure and its interval; empty where there is none."""
    low, high = (row.get(f"{name}_{end}", row[end]) for end in ("low", "high"))
    return ("", "") if row[name] is None else (f"{row[name]:{form}}", f"{low:{form}} to {high:{form}}")
