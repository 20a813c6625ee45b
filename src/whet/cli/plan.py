"""`whet plan`: the recipe as it will run, who gave each value, and what it will cost. Loads no model and no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json, Overrides, RecipeFile

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for these
    from rich.table import Table
    from rich.tree import Tree

    from whet.config.budget import StageBudget
    from whet.config.loading import Loaded, ValueOrigin
    from whet.launch.memory_report import Footprint

STYLES = {"default": "dim", "preset": "magenta", "file": "cyan", "command line": "bold yellow"}


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="Predict each stage's peak memory (some seconds).")] = False,
    json: Json = False,
) -> None:
    """Show every value with its origin, and the arithmetic of each stage. Nothing is loaded or launched."""
    from rich.console import Console

    from whet.config.loading import load_recipe, resolved

    loaded = load_recipe(recipe, overrides or ())
    costs = loaded.recipe.budgets()
    if json:
        origins = {path: str(origin) for path, origin in loaded.origins.items()}
        stages = [asdict(cost) | {"tokens": cost.tokens, "all_tokens": cost.all_tokens} for cost in costs]
        known = {"recipe": resolved(loaded.recipe), "origins": origins, "stages": stages}
        peaks = [_with_sums(need) for need in _footprints(loaded)] if memory else None
        print_json(known if peaks is None else {**known, "memory": peaks})
        return
    console = Console(highlight=False)
    console.print(recipe_tree(loaded))
    console.print(budget_table(costs))
    console.print("Upper bounds; ? is known once the run has read the data or the model.", style="dim")
    if memory:
        needs = _footprints(loaded)
        console.print(memory_table(needs))
        for need in needs:
            for role in need.roles:
                if role.note:
                    console.print(f"{need.stage}, {role.role}: {role.note}", style="dim", markup=False)
            if need.advice:
                console.print(f"{need.stage}: {need.advice}", style="yellow", markup=False)


def recipe_tree(loaded: Loaded) -> Tree:
    """The resolved recipe as a tree; every value is followed by its origin."""
    from rich.text import Text
    from rich.tree import Tree

    from whet.config.loading import resolved

    tree = Tree(Text(one_line(loaded.recipe.name), style="bold"))
    shown = resolved(loaded.recipe)
    shown["stages"] = {name: shown["stages"][name] for name in loaded.recipe.distinct}
    _grow(tree, shown, loaded.origins, "")
    return tree


def budget_table(costs: list[StageBudget]) -> Table:
    """Prompts, sequences, tokens and updates (optimizer steps), of each step and in all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title="What it will cost at most", title_justify="left")
    table.add_column("stage", overflow="fold")
    table.add_column("")
    for heading in ("prompts", "sequences", "tokens", "updates"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in costs:
        updates = cost.optimizer_steps // cost.steps if cost.optimizer_steps is not None and cost.steps else None
        draws = f", drawn up to {cost.rounds} times" if cost.rounds > 1 else ""
        draws += f", in each of up to {cost.repeat} rounds" if cost.repeat > 1 else ""
        step = (cost.prompts, cost.sequences, cost.tokens, updates)
        total = (cost.all_prompts, cost.all_sequences, cost.all_tokens, cost.all_updates)
        table.add_row(Text(f"{cost.stage} ({cost.kind})"), "a step", *map(_number, step))
        table.add_row("", f"{_number(cost.steps)} steps{draws}", *map(_number, total))
    return table


def memory_table(needs: list[Footprint]) -> Table:
    """Each stage's peak memory in MiB, and below it what each of its models takes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Peak memory, MiB", title_justify="left")
    table.add_column("stage", overflow="fold")  # a narrow terminal cuts nothing off
    parts = ("process", "weights", "optimizer", "work", "cache", "peak", "available")
    for heading in parts:
        table.add_column(heading, justify="right", no_wrap=True)
    for need in needs:
        table.add_row(Text(need.stage), *(_mib(getattr(need, part)) for part in parts))
        for role in need.roles if len(need.roles) > 1 else ():
            sizes = {"process": "", "peak": "", "available": "", **asdict(role)}
            cells = (_mib(size) if isinstance(size := sizes[part], int) else size for part in parts)
            table.add_row(Text(f"  {role.role}"), *cells, style="dim")
    return table


def _footprints(loaded: Loaded) -> list[Footprint]:
    from whet.launch.memory import footprints
    from whet.pipeline.run import Run

    return footprints(Run(recipe=loaded.recipe, folder=loaded.recipe.folder))


def _with_sums(need: Footprint) -> dict[str, object]:
    sums = {part: getattr(need, part) for part in ("weights", "optimizer", "work", "cache", "peak")}
    return asdict(need) | sums


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _grow(tree: Tree, value: object, origins: Mapping[str, ValueOrigin], path: str) -> None:
    from rich.text import Text

    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        here = f"{path}.{key}" if path else str(key)
        if here in origins:
            origin = origins[here]
            style = STYLES[origin.kind]
            line = Text.assemble((one_line(f"{key}: {_yaml(child)}"), style), "  ", (one_line(origin.text), "dim"))
            tree.add(line if origin.kind != "default" else Text(line.plain, style="dim"))
        else:
            _grow(tree.add(Text(one_line(str(key)))), child, origins, here)


def _yaml(value: object) -> str:
    """A value as it would be written in the recipe."""
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
