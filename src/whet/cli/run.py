"""`whet run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile

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
