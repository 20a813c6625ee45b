"""`whet compare`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json
from whet.cli.tables import interval, plain_table

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run folders, two or more; the first is the baseline.")
]


def compare(runs: Runs, json: Json = False) -> None:
    """Final held-out numbers of several runs, paired where they answered the same tasks, and what differs in them."""
    from rich.console import Console

    from whet.launch.compare import compare as launch_compare

    found = launch_compare(runs)
    if json:
        print_json({"comparison": asdict(found)})
        return
    console = Console(highlight=False)
    rows = [("seed", *map(str, found.seeds)), *((key, *map(str, values)) for key, values in found.differing.items())]
    console.print(plain_table(("", *found.runs), rows))
    for name in dict.fromkeys(figure.name for figure in found.figures):
        form, shown = ".1%" if name.endswith("accuracy") else ".4f", []
        for each in (figure for figure in (*found.figures, *found.means) if figure.name == name):
            value = interval({"mean": each.value, "low": each.low, "high": each.high}, form)
            gain = interval(each.gain and asdict(each.gain), f"+{form}")
            shown.append((each.run, value[0], value[1], *gain))
        console.print()
        console.print(plain_table((name, "", "95 %", "difference", "95 %"), shown))
