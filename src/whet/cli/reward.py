"""`whet reward` and `whet regrade`: what the rewards of a recipe give, and to what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile

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
    from whet.config.loading import load_recipe
    from whet.launch.lab import try_rewards

    asked: dict[str, Any] = {"stage": stage, "limit": limit, "samples": samples, "model": model, "rollouts": rollouts}
    found = try_rewards(load_recipe(recipe, overrides or ()), **asked, quiet=quiet or json)
    if json:
        print_json(found)
    else:
        print("\n".join(map(one_line, _report(found))))


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

    asked: dict[str, Any] = {"recipe": recipe, "overrides": overrides or (), "stage": stage, "last": last}
    found = launch_regrade(run, **asked, quiet=quiet or json)
    if json:
        print_json(found)
        return
    print(f"{found['stage']}: {found['rollouts']:,} rollouts graded again")
    for name, changed in found["changed"].items():
        print(one_line(f"{name}: {changed:,} changed"))
        for each in [change for change in found["changes"] if change["reward"] == name][:SHOWN]:
            where = f"{each['model']} step {each['step']}, {each['task']}, sample {each['sample']}".strip()
            print(one_line(f"  {where}: {each['old']} -> {each['new']}  {each['reason']}".rstrip()))


def _report(found: Mapping[str, Any]) -> Iterator[str]:
    sources, best = found["sources"], found["wins_with"]
    low, high = found["range"]
    yield f"{found['stage']}: {found['tasks']} tasks"
    yield f"{'answer':18}{'graded':>7}{'lost':>6}{'mean':>9}{'right':>7}   scores from {low:g} to {high:g}"
    for name, each in sources.items():
        tallest = max(each["histogram"]) or 1
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // tallest)] for count in each["histogram"])
        mean, right = _or_dash(each["mean"], ".3f"), _or_dash(each["right"], ".0%")
        yield f"{name:18}{each['answers'] - each['unscored']:7}{each['unscored']:6}{mean:>9}{right:>7}   |{bars}|"
    yield from (f"gold that is refused: {task}: {why}" for task, why in list(found["refused"].items())[:SHOWN])
    for name, each in sources.items():
        if broke := each["broke_a_grader"]:
            yield f"{name}: {len(broke)} broke a grader, the first: {broke[0]}"
        if "all_right" in each:
            yield f"{name}: {each['all_right']:.0%} of the tasks all right, {each['all_wrong']:.0%} all wrong"
    for name, each in found["rewards"].items():
        failed = f", {each['failures']} failed, the first: {each['first_failure']}" if each["failures"] else ""
        yield f"{name}: {each['mean_ms']:.2f} ms an answer, {each['worst_ms']:.2f} at worst{failed}"
    for each in found["disagreements"]:
        yield f"{' and '.join(each['rewards'])} disagree on {each['apart']} of {each['answers']} answers"
        yield from (f"  {example}" for example in each["examples"])
    if best is not None:
        gold = max((sources[name]["mean"] or 0.0 for name in ("gold", "gold in tags") if name in sources), default=None)
        worth = "; the rows name no gold answer" if gold is None else f"; a gold answer has {gold:.3f}"
        yield f"a policy without an answer does best with {best!r}: {sources[best]['mean']:.3f}{worth}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
