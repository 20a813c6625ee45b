"""`whet run`, and `whet demo`: the main job on a laptop, in about a minute, with what the package ships."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shutil import which
from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile
from whet.cli.tables import evaluation_table

Accept = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE.KEY", help="Go on though this differs from what the stage began with (repeatable)."),
]
Restart = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE", help="Start this stage over, and all that read what it made (repeatable)."),
]


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    accept: Accept = None,
    restart: Restart = None,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Take stages of the same identity from the runs in here, e.g. runs."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe's stages in order. A run that was stopped goes on where it was; finished stages are skipped."""
    from whet.config.loading import load_recipe
    from whet.launch.main import run_recipe
    from whet.pipeline.lineage import Choices

    choices = Choices(accept=accept or (), restart=restart or (), reuse=reuse)
    result = run_recipe(load_recipe(recipe, overrides or ()), quiet=quiet or json, choices=choices)
    if json:
        print_json(result)


RECIPE = Path(__file__).parent.parent / "assets" / "demo.yaml"


def demo(
    seed: Annotated[int, typer.Option(help="Another seed is another run.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/demo-seedN by default.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Watch the shipped tiny base model learn to reason, by SFT and then RL, in about a minute."""
    from rich.console import Console

    from whet.launch.python import run as launch_run

    folder = out or Path("runs") / f"demo-seed{seed}"
    evaluation = launch_run(RECIPE, f"seed={seed}", f"out={folder}", quiet=quiet or json).evaluations["eval"]
    report = folder / "report.html"
    if json:
        print_json({"run": folder, "report": report, "evaluation": evaluation})
        return
    console = Console(highlight=False)
    console.print(evaluation_table(evaluation))
    console.print()
    console.print(f"Everything about it:  {report}", markup=False, soft_wrap=True)
    console.print(f"Talk to it:           {_here()} chat {folder} -p 58+67", markup=False, soft_wrap=True)


def _here() -> str:
    """What starts this program in the shell that it was started from."""
    beside = Path(sys.executable).with_name("whet")
    found = which("whet")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "whet"
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m whet"
