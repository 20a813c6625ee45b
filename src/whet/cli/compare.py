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
    for mean in found["means"]:
        numbers = (
            f"{mean[key]:{'.1%' if mean['of'].endswith('accuracy') else '.4f'}}" for key in ("mean", "low", "high")
        )
        shown = "{}: mean over seeds {} (95 % {} to {}; {})".format(mean["of"], *numbers, ", ".join(mean["runs"]))
        console.print(shown, markup=False, soft_wrap=True)
