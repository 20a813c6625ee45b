"""`whet check`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from whet.cli.errors import print_json, printable
from whet.cli.options import Json, Overrides, RecipeFile

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for these
    from rich.text import Text

    from whet.launch.check import StageCheck


def check(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """The data gate of every stage, without training: rows counted and checked, a few shown with their loss mask."""
    from rich.console import Console

    from whet.config.loading import load_recipe
    from whet.launch.check import check_recipe

    stages = check_recipe(load_recipe(recipe, overrides or ()))
    if json:
        print_json({"stages": [asdict(stage) for stage in stages]})
        return
    console = Console(highlight=False, soft_wrap=True)
    for stage in stages:
        console.print(f"[bold]{stage.stage}[/bold] ({stage.kind})  ", end="")
        console.print(stage.summary, markup=False)
        for sample in _coloured(stage):
            console.print(sample)
    console.print("«trained»", style="bold green on grey15", end=" ")
    console.print("and not trained", style="dim")


def _coloured(stage: StageCheck) -> list[Text]:
    """Each sample with its trained stretches in colour, and in «» where there are no colours."""
    from rich.text import Text

    samples = []
    for parts in stage.samples:
        text = Text("  ")
        for part in parts:
            shown = printable(part.text).replace("\n", "\n  ")
            text.append(f"«{shown}»" if part.trained else shown, "bold green on grey15" if part.trained else "dim")
        samples.append(text)
    return samples
