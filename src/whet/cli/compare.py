"""`whet compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json
from whet.cli.tables import evaluation_table, plain_table

Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; the first is the baseline.")]


def compare(runs: Runs, json: Json = False) -> None:
    """Held-out numbers of several runs, paired where they had the same tasks or rows, and the keys that differ."""
    from rich.console import Console

    from whet.launch.compare import compare_runs

    found = compare_runs(runs)
    if json:
        print_json({"comparison": found})
        return
    console = Console(highlight=False)
    differing = [(key, *map(str, values)) for key, values in found["differing"].items()]
    console.print(plain_table(("differing", *found["runs"]), differing))
    for name, table in found["tables"].items():
        console.print(f"\n{name}", markup=False)
        console.print(evaluation_table(table, label="run"))
    for name, values in found["last"].items():
        console.print(f"\n{name}", markup=False)
        console.print(plain_table(("run", "at the end"), ((run, f"{value:.4f}") for run, value in values.items())))
    for mean in found["means"]:
        shown = "{of}: mean over seeds {mean:.4f} (95 % {low:.4f} to {high:.4f}; ".format(**mean)
        console.print(f"{shown}{', '.join(mean['runs'])})", markup=False, soft_wrap=True)
