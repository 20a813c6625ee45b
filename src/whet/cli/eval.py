"""`whet eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile
from whet.cli.tables import evaluation_table
from whet.errors import ConfigError


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="LABEL=PATH, may be repeated: a run, RUN@stage, a directory or a hub id."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Only a recipe's evaluation, on models that are there already: the stage's own, or those given.

    A file of rows in the recipe's place: their held-out loss under the models given.
    """
    from rich.console import Console

    from whet.config.loading import load_recipe
    from whet.launch.evaluate import evaluate as launch_evaluate
    from whet.launch.evaluate import load_rows

    models: dict[str, str] = {}
    for label, path in map(_labelled, model or ()):
        if label in models:
            raise ConfigError(f"--model {label}={path}: the label is taken by {models[label]}; give each its own")
        models[label] = path
    rows = recipe.suffix not in (".yaml", ".yml", "") or recipe.is_dir()
    loaded = load_rows(recipe, models, overrides or ()) if rows else load_recipe(recipe, overrides or ())
    table = launch_evaluate(loaded, models, quiet=quiet or json)
    if json:
        print_json({"evaluation": table})
    else:
        Console(highlight=False).print(evaluation_table(table))


def _labelled(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    if not (label and equals and path):
        raise ConfigError(f"--model {text}: write LABEL=PATH, for example rl=runs/demo-seed0@rl")
    return label, path
