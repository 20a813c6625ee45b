"""`whet compare`: final held-out numbers of several runs beside one another, and the keys in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.config.loading import leaves
from whet.config.node import dotted
from whet.errors import RunError
from whet.evals.stats import mean_interval, paired_interval, runs_interval
from whet.files import read_json
from whet.launch.python import RunResults
from whet.tracking.log import read_metrics, verdicts

BESIDE = ("name", "description", "out", "seed", "threads", "trackers", "save")
"""Keys of a recipe that are no settings."""
HELD_OUT = ("eval_loss", "eval_accuracy")
"""Metrics of held-out rows."""


def compare_runs(names: Sequence[str]) -> dict[str, Any]:
    """What several runs came to.

    `differing`: the seed, and every setting that is not the same, in each run. `tables`: as in `eval.json`, with a run
    in the place of a model, paired with the first where both had the same tasks. `last`: held-out metrics of training.
    `means`: over runs that differ in the seed alone. `silent`: runs with
    nothing held out yet. Raises `RunError` where there is no run, or nothing held out in any.
    """
    runs = {name: RunResults(name) for name in names}
    recipes = {name: run.recipe for name, run in runs.items()}
    settings = {n: {dotted(p): value for p, value in leaves(r) if p[0] not in BESIDE} for n, r in recipes.items()}
    values = {"seed": [recipe["seed"] for recipe in recipes.values()]}
    for key in dict.fromkeys(key for each in settings.values() for key in each):
        values[key] = [each.get(key) for each in settings.values()]
    rows: dict[str, list[dict[str, Any]]] = {}
    last: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        evaluations = run.evaluations
        for stage, folder in run.folders():
            for row in evaluations[stage]["rows"] if stage in evaluations else ():
                at = {"run": name, "log": folder / row["label"]}
                rows.setdefault(f"{stage}: {row['label']}", []).append(row | at)
            found = {metric: line[metric] for line in read_metrics(folder) for metric in HELD_OUT if metric in line}
            for metric, value in found.items():
                last.setdefault(f"{stage}: {metric}", {})[name] = math.nan if value is None else value
    if not rows and not last:
        raise RunError(f"{', '.join(names)}: nothing held out yet (a stage of kind eval, or eval_data)")
    figures = {f"{name}: accuracy": {row["run"]: row["accuracy"] for row in there} for name, there in rows.items()}
    return {
        "runs": list(runs),
        "differing": {key: each for key, each in values.items() if key == "seed" or each != each[:1] * len(each)},
        "tables": {name: {"rows": _paired(there), "k": there[0]["samples"]} for name, there in rows.items()},
        "last": last,
        "means": _means({**figures, **last}, settings),
        "silent": [name for name in runs if not any(name in each for each in [*figures.values(), *last.values()])],
    }


def _paired(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows under their runs' names, each with its gain over the first one where both had the same tasks."""
    first, found = rows[0]["log"], []
    for row in rows:
        gain = None
        if row["log"] != first and _tasks(row["log"]) == _tasks(first):
            before, after = verdicts(first), verdicts(row["log"])
            both = [task for task in before if task in after]
            gain = paired_interval([before[task] for task in both], [after[task] for task in both]) if both else None
        ends = {"gain": None} if gain is None else {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        kept = {
            key: value
            for key, value in row.items()
            if key not in ("run", "log") and not key.startswith(("gain", "step"))
        }
        found.append({**kept, "label": row["run"], **ends})
    return found


def _tasks(log: Path) -> str:
    """What was asked, by content."""
    identity = read_json(log.parent / "stage.json")["identity"]
    keys = {key: value for key, value in identity["config"].items() if key.startswith("tasks.")}
    return json.dumps([{**identity["inputs"]["tasks"], "path": ""}, keys])


def _means(figures: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    alike: dict[str, list[str]] = {}
    for run, each in settings.items():
        alike.setdefault(json.dumps(each, sort_keys=True), []).append(run)
    found = []
    for name, values in figures.items():
        for runs in alike.values():
            if len(there := [values[run] for run in runs if run in values]) > 1:
                share = name.endswith("accuracy")
                at = mean_interval([[value] for value in there]) if share else runs_interval(there)
                found.append({"of": name, "runs": runs, "mean": at.mean, "low": at.low, "high": at.high})
    return found
