"""`whet reward` and `whet regrade`: what the rewards of a recipe give, and to what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for it
    from rich.table import Table

Stage = Annotated[str | None, typer.Option(help="The stage, where several have rewards.")]
BARS = " ▁▂▃▄▅▆▇█"
SHOWN = 10


def reward(
    recipe: RecipeFile,
    overrides: Overrides = None,
    stage: Stage = None,
    limit: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 64,
    samples: Annotated[int, typer.Option(min=0, help="Answers that a model samples to each task.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Who samples them: RUN, RUN@stage, a path.")
    ] = None,
    rollouts: Annotated[Path | None, typer.Option(help="A run whose last rollouts are graded, too.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a stage's rewards give to golds, to answers that deserve nothing, to a model's and to saved ones."""
    from rich.console import Console

    from whet.config.loading import load_recipe
    from whet.launch.lab import try_rewards

    loaded = load_recipe(recipe, overrides or ())
    asked = {"stage": stage, "limit": limit, "samples": samples, "model": model, "rollouts": rollouts}
    found = try_rewards(loaded, **asked, quiet=quiet or json)
    if json:
        print_json(found)
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{found['stage']}: {found['tasks']} tasks, scores from {found['range'][0]:g} to {found['range'][1]:g}"
    )
    console.print(_table(found["sources"]))
    for line in _findings(found):
        console.print(one_line(line))


def regrade(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    overrides: Overrides = None,
    stage: Stage = None,
    recipe: Annotated[Path | None, typer.Option(help="Grade by this recipe's rewards, not by the run's own.")] = None,
    last: Annotated[int, typer.Option(min=0, help="Only the last steps, so many; 0: all.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Grade a run's saved rollouts again, without sampling, and say which verdicts changed. The run stays as it is."""
    from whet.launch.lab import regrade as launch_regrade

    asked = {"recipe": recipe, "overrides": overrides or (), "stage": stage, "last": last}
    found = launch_regrade(run, **asked, quiet=quiet or json)
    if json:
        print_json(found)
        return
    print(f"{found['stage']}: {found['rollouts']:,} rollouts graded again")
    for name, changed in found["changed"].items():
        print(one_line(f"{name}: {changed:,} changed"))
        for each in [change for change in found["changes"] if change["reward"] == name][:SHOWN]:
            where = f"{each['model']} step {each['step']}, {each['task']}, sample {each['sample']}".strip()
            print(one_line(f"  {where}: {each['old']} -> {each['new']}  {each['reason']}"))


def _table(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for heading in ("answer", "graded", "unscored", "mean", "right", "scores"):
        table.add_column(heading, justify="left" if heading in ("answer", "scores") else "right", no_wrap=True)
    for name, found in sources.items():
        tallest = max(found["histogram"]) or 1
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // tallest)] for count in found["histogram"])
        mean = "" if found["mean"] is None else f"{found['mean']:.3f}"
        right = "" if found["right"] is None else f"{found['right']:.0%}"
        table.add_row(name, str(found["answers"] - found["unscored"]), str(found["unscored"]), mean, right, f"|{bars}|")
    return table


def _findings(found: Mapping[str, Any]) -> list[str]:
    sources, best = found["sources"], found["wins_with"]
    lines = [f"refused gold: {task}: {why}" for task, why in list(found["refused"].items())[:SHOWN]]
    for name, each in sources.items():
        if "all_right" in each:
            lines.append(f"{name}: {each['all_right']:.0%} of tasks all right, {each['all_wrong']:.0%} all wrong")
    for name, each in found["rewards"].items():
        failed = f", {each['failures']} failed, first: {each['first_failure']}" if each["failures"] else ""
        lines.append(f"{name}: {each['mean_ms']:.2f} ms an answer, {each['worst_ms']:.2f} at worst{failed}")
    for each in found["disagreements"]:
        lines.append(f"{' and '.join(each['rewards'])} disagree on {each['apart']} of {each['answers']} answers")
        lines += [f"  {example}" for example in each["examples"]]
    if best is not None:
        gold = max((sources[name]["mean"] for name in ("gold", "gold in tags") if name in sources), default=None)
        lines.append(
            f"without an answer a policy would win most with {best!r}: {sources[best]['mean']:.3f}"
            + ("" if gold is None else f", where a gold answer is worth {gold:.3f}")
        )
    return lines
