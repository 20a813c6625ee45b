"""`whet eval`."""

from __future__ import annotations

from whet.cli.errors import print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile


def evaluate(recipe: RecipeFile, overrides: Overrides = None, json: Json = False, quiet: Quiet = False) -> None:
    """Run only a recipe's eval stages, on models that are already there."""
    from whet.config.loading import load_recipe
    from whet.launch.main import evaluate as launch_evaluate

    result = launch_evaluate(load_recipe(recipe, overrides or ()), quiet=quiet or json)
    if json:
        print_json(result)
