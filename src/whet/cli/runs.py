"""`whet runs`, `show`, `diff`, `compare` and `gc`: what there is, and how it came to be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json
from whet.cli.tables import evaluation_table, plain_table

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Runs = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of runs, or one run.")]


def runs(folder: Runs = Path("runs"), json: Json = False) -> None:
    """The runs in a folder: how far each is, its size, its last evaluation."""
    from whet.launch.runs import runs_in

    _print({"runs": runs_in(folder)}, json)


def show(run: RunFolder, json: Json = False) -> None:
    """The stages of a run: identities, what each reads, the data from outside, and evaluations."""
    from whet.launch.runs import show as launch_show

    _print(launch_show(run), json)


def diff(first: RunFolder, second: RunFolder, json: Json = False) -> None:
    """How the second run differs from the first: recipe, data, code, and evaluations, paired by task."""
    from whet.launch.runs import diff as launch_diff

    _print(dict(launch_diff(first, second)), json)


def gc(
    folder: Runs = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would be done.")] = False,
    json: Json = False,
) -> None:
    """Free room and lose nothing: checkpoints of finished stages, and equal files of runs, which become one."""
    from whet.launch.runs import gc as launch_gc

    _print({"gc": launch_gc(folder, dry=not yes)}, json)


def _print(found: dict[str, Any], json: bool) -> None:
    import yaml

    if json:
        print_json(found)
        return
    for line in yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=1000).splitlines():
        typer.echo(one_line(line))


Several = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; the first is the baseline.")]


def compare(runs: Several, json: Json = False) -> None:
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
    for name in found["silent"]:
        console.print(f"\n{name}: nothing held out yet", markup=False)
