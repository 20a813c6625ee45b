"""`whet compare`: the final held-out numbers of several runs beside one another, and the keys in which they differ.

Two runs that answered the same tasks, or read the same rows, are compared task by task; runs that differ in nothing but
their seed have a mean with the interval over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.config.loading import leaves
from whet.config.node import dotted
from whet.errors import RunError
from whet.evals.perplexity import RowLoss, change
from whet.evals.stats import Interval, paired_interval, runs_interval
from whet.files import is_sealed, read_json
from whet.launch.results import RunResults
from whet.tracking.log import read_metrics, read_rollout_table

BESIDE = ("name", "description", "out", "seed", "threads", "trackers", "save")
"""Keys of a recipe that are no settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One held-out number of one run."""

    name: str
    """`STAGE LABEL accuracy`, `STAGE LABEL loss`, `STAGE eval_loss`."""
    run: str
    value: float
    low: float | None = None
    high: float | None = None
    gain: Interval | None = None
    """The paired difference to the first run; None: not of the same tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `whet compare` shows."""

    runs: Sequence[str]
    seeds: Sequence[int]
    differing: Mapping[str, Sequence[Any]]
    """A key that is not the same in all runs: its value in each, None where it has none."""
    figures: Sequence[Figure]
    means: Sequence[Figure]
    """Over the seeds of the same settings; `run` names them."""


def compare(folders: Sequence[str]) -> Comparison:
    """Read the runs. Raises `RunError` where one is none, or has no held-out numbers yet."""
    runs = {name: RunResults(name) for name in dict.fromkeys(folders)}
    if len(runs) < 2:
        raise RunError(f"{', '.join(runs)}: one run alone; name two or more")
    settings = {name: _settings(run.recipe) for name, run in runs.items()}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    values = {key: [each.get(key) for each in settings.values()] for key in keys}
    found = {name: dict(_figures(name, run)) for name, run in runs.items()}
    if empty := [name for name, figures in found.items() if not figures]:
        raise RunError(f"{empty[0]}: has no held-out numbers (a stage of kind eval, or eval_data); run it to the end")
    names = dict.fromkeys(figure for figures in found.values() for figure in figures)
    figures = [f for name in names for f in _paired([each[name] for each in found.values() if name in each])]
    return Comparison(
        runs=list(runs),
        seeds=[run.recipe["seed"] for run in runs.values()],
        differing={key: each for key, each in values.items() if any(value != each[0] for value in each)},
        figures=figures,
        means=list(_means(figures, settings)),
    )


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {dotted(path): value for path, value in leaves(recipe) if path[0] not in BESIDE}


@dataclass(frozen=True, slots=True)
class _Found:
    figure: Figure
    asked: str = ""
    """What was answered: equal for the same tasks or rows."""
    scores: Mapping[str, Sequence[float]] | Sequence[RowLoss] = ()


def _figures(name: str, run: RunResults) -> Iterator[tuple[str, _Found]]:
    """The final numbers of every finished stage."""
    for stage, folder in run.folders():
        if not is_sealed(folder):
            continue
        for row in run.evaluations.get(stage, {"rows": []})["rows"]:
            what = "accuracy" if "accuracy" in row else "loss"
            key = f"{stage} {row['label']} {what}"
            figure = Figure(name=key, run=name, value=row[what], low=row["low"], high=row["high"])
            yield key, _Found(figure, _asked(folder), _scores(folder, row["label"]))
        last = next(
            (line for line in reversed(read_metrics(folder)) if any(key.startswith("eval_") for key in line)), {}
        )
        for metric in ("eval_loss", "eval_accuracy"):
            if isinstance(value := last.get(metric), float):
                yield f"{stage} {metric}", _Found(Figure(name=f"{stage} {metric}", run=name, value=value))


def _asked(folder: Path) -> str:
    """The tasks or rows of an evaluation, by content."""
    identity = read_json(folder / "stage.json")["identity"]
    inputs = {key: {**content, "path": ""} for key, content in identity["inputs"].items() if key in ("tasks", "data")}
    return json.dumps([inputs, {k: v for k, v in identity["config"].items() if k.startswith(("tasks.", "data."))}])


def _scores(folder: Path, label: str) -> Mapping[str, Sequence[float]] | Sequence[RowLoss]:
    """What the intervals are made of: 1 or 0 for each answer of each task, or what each row cost."""
    if (folder / f"{label}.json").is_file():
        return [RowLoss(**row) for row in read_json(folder / f"{label}.json")["rows"]]
    table = read_rollout_table(folder / label, columns=["task", "correct"])
    scores: dict[str, list[float]] = {}
    for row in [] if table is None else table.to_pylist():
        if row["correct"] is not None:
            scores.setdefault(row["task"], []).append(float(row["correct"]))
    return scores


def _paired(found: Sequence[_Found]) -> Iterator[Figure]:
    first, *others = found
    yield first.figure
    for other in others:
        same = first.asked and first.asked == other.asked
        yield replace(other.figure, gain=_gain(first.scores, other.scores) if same else None)


def _gain(before: Any, after: Any) -> Interval | None:
    if not isinstance(before, Mapping):
        return change(before, after)
    both = [task for task in before if task in after]
    return paired_interval([before[t] for t in both], [after[t] for t in both]) if both else None


def _means(figures: Sequence[Figure], settings: Mapping[str, Mapping[str, Any]]) -> Iterator[Figure]:
    """For the runs of each group of equal settings the mean of every figure."""
    groups: dict[str, list[str]] = {}
    for name, each in settings.items():
        groups.setdefault(json.dumps(each, sort_keys=True), []).append(name)
    for runs in groups.values():
        for name in dict.fromkeys(figure.name for figure in figures):
            values = [figure.value for figure in figures if figure.name == name and figure.run in runs]
            if len(values) > 1:
                at = runs_interval(values)
                yield Figure(name=name, run=", ".join(runs), value=at.mean, low=at.low, high=at.high)
