"""`whet compare`: final held-out numbers of several runs beside one another, and the keys in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.config.loading import leaves
from whet.config.node import dotted
from whet.errors import RunError
from whet.evals.perplexity import loss_table
from whet.evals.run import SampledAnswer, compare, summarise, table
from whet.evals.stats import runs_interval
from whet.files import read_json
from whet.launch.results import RunResults
from whet.records import Outcome
from whet.tracking.log import read_rollout_table

BESIDE = ("name", "description", "out", "seed", "threads", "trackers", "save")
"""Keys of a recipe that are no settings."""


def compare_runs(names: Sequence[str]) -> dict[str, Any]:
    """`differing`: a key's value in each run. `tables`: as in `eval.json`, `perplexity.json`, with runs for models,
    each paired with the first where both had the same tasks or rows. `means`: of runs that differ in the seed alone.

    Raises `RunError` where there is no run, or no table.
    """
    runs = {name: RunResults(name) for name in names}
    recipes = [run.recipe for run in runs.values()]
    settings = [{dotted(p): value for p, value in leaves(each) if p[0] not in BESIDE} for each in recipes]
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {"seed": [each["seed"] for each in recipes], **{key: [s.get(key) for s in settings] for key in keys}}
    found: dict[str, dict[str, tuple[Path, str]]] = {}
    for name, run in runs.items():
        for stage, evaluation in run.evaluations.items():
            for row in evaluation["rows"]:
                place = dict(run.folders())[stage], row["label"]
                found.setdefault(f"{stage}: {row['label']}", {})[name] = place
    if not found:
        raise RunError(f"{', '.join(names)}: nothing was evaluated yet (by a stage of kind eval or perplexity)")
    tables = {name: _table(places) for name, places in found.items()}
    alike: dict[str, list[str]] = {}
    for name, each in zip(runs, settings, strict=True):
        alike.setdefault(json.dumps(each, sort_keys=True), []).append(name)
    return {
        "runs": list(runs),
        "differing": {key: each for key, each in values.items() if any(value != each[0] for value in each)},
        "tables": tables,
        "means": [mean for seeds in alike.values() for name in tables for mean in _mean(name, tables[name], seeds)],
    }


def _table(places: Mapping[str, tuple[Path, str]]) -> dict[str, Any]:
    """What the runs' models came to in one evaluation, each beside the first of them."""
    (first, at), *_ = places.items()
    rows = []
    for run, place in places.items():
        paired = {first: _answers(*at)} if run != first and _asked(place[0]) == _asked(at[0]) else {}
        given = {**paired, run: _answers(*place)}
        made = table(compare([summarise(*each) for each in given.items()])) if _played(place) else loss_table(given)
        rows.append(made["rows"][-1])
    return {"rows": rows, **({"k": rows[0]["samples"]} if _played(at) else {})}


def _played(place: tuple[Path, str]) -> bool:
    return (place[0] / "eval.json").is_file()


def _answers(folder: Path, label: str) -> Any:
    """The graded answers of one model, task by task; or what each row cost it."""
    if not _played((folder, label)):
        return read_json(folder / f"{label}.json")["rows"]
    columns = ["task", "correct", "completion_tokens", "outcome", "parts"]
    read = read_rollout_table(folder / label, columns=columns)
    answers: dict[str, list[SampledAnswer]] = {}
    for row in [] if read is None else read.to_pylist():
        answer = SampledAnswer(
            correct=row["correct"],
            tokens=len(row["completion_tokens"]),
            truncated=row["outcome"] == Outcome.TRUNCATED,
            rewards=json.loads(row["parts"]),
        )
        answers.setdefault(row["task"], []).append(answer)
    return answers


def _asked(folder: Path) -> str:
    """The tasks or rows of an evaluation, by content."""
    identity = read_json(folder / "stage.json")["identity"]
    inputs = [{**identity["inputs"][key], "path": ""} for key in ("tasks", "data") if key in identity["inputs"]]
    return json.dumps([inputs, {k: v for k, v in identity["config"].items() if k.startswith(("tasks.", "data."))}])


def _mean(name: str, of: Mapping[str, Any], seeds: Sequence[str]) -> list[dict[str, Any]]:
    metric = "accuracy" if "k" in of else "loss"
    values = [row[metric] for row in of["rows"] if row["label"] in seeds]
    if len(values) < 2:
        return []
    at = runs_interval(values)
    return [{"of": f"{name} {metric}", "runs": list(seeds), "mean": at.mean, "low": at.low, "high": at.high}]
