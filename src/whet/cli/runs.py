"""`whet runs`, `whet show`, `whet diff` and `whet gc`: what there is, and how it came to be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Runs = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of runs, or one run.")]


def runs(folder: Runs = Path("runs"), json: Json = False) -> None:
    """The runs in a folder: how far each is, its last evaluation, and its size."""
    from whet.launch.runs import runs_in

    _print_rows({"runs": runs_in(folder)}, json)


def show(run: RunFolder, json: Json = False) -> None:
    """The stages of a run: identities, what each reads, the data from outside, and evaluations."""
    from whet.launch.runs import show as launch_show

    _print_rows(launch_show(run), json)


def diff(first: RunFolder, second: RunFolder, json: Json = False) -> None:
    """How the second run differs from the first: recipe, inputs, code, and evaluations, paired by task."""
    from whet.launch.runs import diff as launch_diff

    found = launch_diff(first, second)
    if json:
        print_json(dict(found))
        return
    for part, lines in found.items():
        for line in lines or ["no difference"]:
            typer.echo(one_line(f"{part}: {line}"))


def gc(
    folder: Runs = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would be done.")] = False,
    json: Json = False,
) -> None:
    """Free room and lose nothing: checkpoints of finished stages, and equal files of runs, which are linked."""
    from whet.launch.runs import gc as launch_gc

    said = launch_gc(folder, dry=not yes)
    if json:
        print_json({"freed": said})
        return
    for line in said:
        typer.echo(one_line(line))


def _print_rows(found: dict[str, Any], json: bool) -> None:
    """Each list of rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if json:
        print_json(found)
        return
    for rows in (rows for rows in found.values() if isinstance(rows, list) and rows):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
        for heading in rows[0]:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        Console(highlight=False).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {share:.1%}" for key, share in value.items())
    return ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
