"""`whet run`."""

from __future__ import annotations

from whet.cli.errors import print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile


def run(recipe: RecipeFile, overrides: Overrides = None, json: Json = False, quiet: Quiet = False) -> None:
    """Run a recipe's stages in order. A run that was stopped goes on where it was; finished stages are skipped."""
    from whet.config.loading import load_recipe
    from whet.launch.main import run_recipe

    result = run_recipe(load_recipe(recipe, overrides or ()), quiet=quiet or json)
    if json:
        print_json(result)
