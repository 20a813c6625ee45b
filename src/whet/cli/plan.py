"""`whet plan`: the recipe as it will run, the origin of each value, and what it will cost. Loads no model, no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json, Overrides, RecipeFile

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for these
    from rich.console import Console
    from rich.table import Table
    from rich.tree import Tree

    from whet.cli.tables import PlainTable
    from whet.config.budget import StageBudget
    from whet.config.loading import Loaded, ValueOrigin
    from whet.launch.forecast import Forecast
    from whet.launch.memory_report import Footprint

NOT_SHOWN = ("trainer_gpus", "sampler_gpus", "beside", "lengths", "seen")
STYLES = {"default": "dim", "preset": "magenta", "file": "cyan", "command line": "bold yellow"}


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="Predict each stage's peak memory (some seconds).")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Predict a step of RL on 8 to 4,096 GPUs (some seconds).")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --simulate: a rate, a length, the lag ... (repeatable)."),
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(metavar="RUN", help="With --simulate: answers as long as those of this run.")
    ] = None,
    json: Json = False,
) -> None:
    """Show every value with its origin, and the arithmetic of each stage. Nothing is loaded or launched."""
    from rich.console import Console

    from whet.config.loading import load_recipe, resolved

    loaded = load_recipe(recipe, overrides or ())
    costs = loaded.recipe.budgets()
    simulated = _forecasts(loaded, assume or [], lengths) if simulate else None
    if json:
        origins = {path: str(origin) for path, origin in loaded.origins.items()}
        stages = [asdict(cost) | {"tokens": cost.tokens, "all_tokens": cost.total(cost.tokens)} for cost in costs]
        known = {"recipe": resolved(loaded.recipe), "origins": origins, "stages": stages}
        if memory:
            known["memory"] = [_with_sums(need) for need in _footprints(loaded)]
        if simulated is not None:
            known["simulation"] = {"assumed": simulated[0], "sizes": [asdict(each) for each in simulated[1]]}
        print_json(known)
        return
    console = Console(highlight=False)
    console.print(recipe_tree(loaded))
    console.print(budget_table(costs))
    for line in rank_lines(loaded):
        console.print(line, markup=False)
    console.print("Upper bounds; ? is known once the run has read the data or the model.", style="dim")
    if memory:
        _print_memory(console, _footprints(loaded))
    if simulated is not None:
        console.print(forecast_table(simulated[1]))
        shown = ", ".join(f"{key}={value}" for key, value in simulated[0].items())
        console.print(
            f"idle: trainer and samplers; lag: mean and greatest. Assumed: {shown}", style="dim", markup=False
        )


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
        total = (*map(cost.total, step[:3]), cost.all_updates)
        table.add_row(Text(f"{cost.stage} ({cost.kind})"), "a step", *map(_number, step))
        table.add_row("", f"{_number(cost.steps)} steps{draws}", *map(_number, total))
    return table


def rank_lines(loaded: Loaded) -> list[str]:
    """How the trainer's ranks share a step; nothing of one process."""
    trainer = loaded.recipe.machine.trainer
    if trainer.ranks == 1:
        return []
    shards, copies = trainer.ranks // trainer.replicate, f", {trainer.replicate} copies" * (trainer.replicate > 1)
    lines = [
        f"Trainer: {trainer.ranks} ranks ({trainer.nodes} x {trainer.gpus}), 1/{shards} of the model on each{copies}"
        + f", each micro-batch on {trainer.context} together" * (trainer.context > 1)
    ]
    parts = trainer.ranks // trainer.context
    for name, stage in loaded.recipe.distinct.items():
        if (cost := stage.budget()).sequences and cost.optimizer_steps and hasattr(stage, "train"):
            each = (
                f"about {cost.sequences / parts:.4g} on {'a rank' if trainer.context == 1 else 'those'}, cut by tokens"
            )
            lines.append(f"  {name}: {cost.sequences:,} sequences a step as on one process, {each}")
    return lines


def memory_table(needs: list[Footprint]) -> Table:
    """Each stage's peak memory in MiB, and below it what each of its models takes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = "Peak memory in MiB. Rows that are not at hand: full micro-batches, prompts of 512 tokens"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("stage", overflow="fold")  # a narrow terminal cuts nothing off
    parts = ("process", "weights", "optimizer", "work", "cache", "peak", "available")
    for heading in parts:
        table.add_column(heading, justify="right", no_wrap=True)
    for need in needs:
        each = f", each of {need.ranks} ranks" if need.ranks > 1 else ""
        table.add_row(Text(f"{need.stage}{each}"), *(_mib(getattr(need, part)) for part in parts))
        for role in need.roles if len(need.roles) > 1 else ():
            sizes = {"process": "", "peak": "", "available": "", **asdict(role)}
            cells = (_mib(size) if isinstance(size := sizes[part], int) else size for part in parts)
            table.add_row(Text(f"  {role.role}"), *cells, style="dim")
    return table


def _print_memory(console: Console, needs: list[Footprint]) -> None:
    console.print(memory_table(needs))
    for need in needs:
        for role in need.roles:
            if role.note:
                console.print(f"{need.stage}, {role.role}: {role.note}", style="dim", markup=False)
        beside = {"the driver has {} MiB beside them (to sample, and models that are asked)": need.driver}
        beside["the sampler processes have {} MiB more, all together"] = need.samplers
        for line, size in beside.items():
            if size:
                console.print(f"{need.stage}: {line.format(_mib(size))}", style="dim", markup=False)
        if need.advice:
            console.print(f"{need.stage}: {need.advice}", style="yellow", markup=False)


def forecast_table(found: list[Forecast]) -> PlainTable:
    """A step on all GPUs in turns, and on their best division: idle shares, mean and greatest lag, trained tokens."""
    from whet.cli.tables import plain_table

    headings = ("GPUs", "in turns", "train+sample", "apart", "idle", "and", "lag", "tok/s/GPU")
    rows = [
        (
            f"{each.gpus:,}",
            f"{each.beside.step_s:,.1f} s",
            f"{each.trainer_gpus:,}+{each.sampler_gpus:,}",
            f"{each.apart.step_s:,.1f} s",
            f"{each.apart.trainer_idle:.0%}",
            f"{each.apart.sampler_idle:.0%}",
            f"{each.apart.lag:.1f} ({each.apart.greatest_lag})",
            f"{each.apart.tokens_s:,.0f}",
        )
        for each in found
    ]
    return plain_table(headings, rows)


def _forecasts(loaded: Loaded, assume: list[str], lengths: Path | None) -> tuple[dict[str, object], list[Forecast]]:
    from whet.launch.forecast import forecasts, setup_of

    setup = setup_of(loaded.recipe, assume, lengths)
    known = {**asdict(setup), **asdict(setup.lengths)}
    return {key: value for key, value in known.items() if key not in NOT_SHOWN}, forecasts(setup)


def _footprints(loaded: Loaded) -> list[Footprint]:
    from functools import partial

    from whet.launch.check import seen_at_hand
    from whet.launch.memory import footprints
    from whet.pipeline.run import Run

    run = Run(recipe=loaded.recipe, folder=loaded.recipe.folder)
    return footprints(run, partial(seen_at_hand, run))


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
