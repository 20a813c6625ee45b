"""`whet check`."""

from __future__ import annotations

from whet.cli.errors import print_json
from whet.cli.options import Json, Overrides, RecipeFile


def check(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Load everything that a recipe names (data, models, rewards) and try one small step, without writing a run."""
    from whet.config.loading import load_recipe
    from whet.launch.main import check_recipe

    result = check_recipe(load_recipe(recipe, overrides or ()), quiet=json)
    if json:
        print_json(result)
