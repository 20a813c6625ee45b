"""`report.html`: the whole run on one page that needs no network, no scripts and no server.

It reads what the pipeline leaves in a run folder, finished or not, and shows what is there:

    RUN/recipe.json   the resolved recipe        RUN/run.json   name, seed, versions, ...
    RUN/stages/NN-name/   stage.json, metrics.jsonl, rollouts/*.parquet, eval.json, reward.json, manifest.json
                          (when done)

Text that a model wrote is escaped by the template engine, everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from whet.errors import RunError
from whet.files import write_atomic
from whet.tracking.charts import PLAIN, TONES, Look, board
from whet.tracking.graph import StageNode, graph
from whet.tracking.judged import judged
from whet.tracking.log import Rollout, read_metrics, read_rollouts, rollout_steps, rollout_tasks
from whet.tracking.summary import EvalLine, StageView, duration_s, figures, stage_line, stage_note, verdict
from whet.tracking.svg import Axis, Series, interval, line_chart, nice_ticks
from whet.tracking.text import counted, number, percent, points, seconds

SHOWN = 3
"""Best rollouts and worst, each."""
LATEST = 5
"""Steps at the end from which they are taken."""
LONGEST = 4000
"""Characters shown of one text."""
THINKING = Axis(label="accuracy", show=percent, floor=0.0, along="tokens of thinking")
SPECIAL = re.compile(r"(<\|[^|>\s]{1,40}\|>|</?(?:think|answer|tool_call|s)>)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A rollout made ready for showing."""

    rollout: Rollout
    prompt: list[tuple[str, bool]]
    """(text, whether it is a special token) pieces."""
    completion: list[tuple[str, bool]]
    cut: int
    """Characters left out of both."""
    surprise: float | None
    """Mean negative log-probability of the tokens that the policy wrote, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Rollouts worth reading of one stage."""

    stage: str
    best: list[Card]
    worst: list[Card]
    early: Card | None
    late: Card | None
    """The same task at the start and at the end, if any was played at both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """An evaluation with its plots: each row with an interval, and a gain's interval where it has one."""

    stage: str
    baseline: str
    rows: list[tuple[EvalLine, str, str]]
    ks: list[tuple[str, str]]
    """What k answers come to: the rule and k."""
    rewards: list[str]
    """Those whose means say more than the accuracy does."""
    scale: tuple[float, float]
    gain_scale: tuple[float, float] | None
    steps: bool
    """Whether a row's gain over the row before says more than that over the baseline."""
    curve: str = ""
    """Accuracy over tokens of thinking, where there were budgets."""
    legend: Sequence[tuple[str, str]] = ()


Reads = Mapping[str, Collection[str]]
"""Of each stage the stages whose artifacts it reads."""
UNKNOWN: Reads = MappingProxyType({})


def write_report(
    run_folder: Path, looks: Mapping[str, Look], *, reads: Reads = UNKNOWN, failure: str = "", live: bool = False
) -> Path:
    """Write `report.html` into the run folder and return its path; `looks` says how each kind of stage is shown.

    `failure`: why the run could not go on; it is the headline then. `live`: the run is at work, so the page loads
    itself again every now and then.
    Raises `RunError` where the folder holds no run, or a file in it cannot be read.
    """
    if not (run_folder / "recipe.json").exists() and not (run_folder / "stages").is_dir():
        raise RunError(
            f"{run_folder}: not a run folder (neither recipe.json nor stages/ is there); give one of `runs/`"
        )
    recipe, info = _read_json(run_folder / "recipe.json"), _read_json(run_folder / "run.json")
    folders = sorted(path for path in (run_folder / "stages").glob("*") if path.is_dir())
    begun = tuple(_stage(folder, recipe, looks) for folder in folders)
    stages = (*begun, *_waiting(recipe, begun, looks))
    charts = {s.name: board(s.lines, s.look.charts) for s in begun if s.lines}
    text: str = _template().render(
        name=info["name"] if "name" in info else run_folder.resolve().name,
        description=recipe["description"] if "description" in recipe else "",
        verdict=verdict(stages, failure),
        failed=bool(failure),
        figures=figures(stages),
        stages=[(stage, stage_line(stage), duration_s(stage)) for stage in stages],
        charts=charts,
        tables=[_table(stage) for stage in begun if stage.rows],
        judged=[
            j for j in (judged(s.name, _read_json(f / "reward.json")) for f, s in zip(folders, begun, strict=True)) if j
        ],
        examples=[e for e in (_examples(f, s) for f, s in zip(folders, begun, strict=True)) if e],
        facts=_facts(info, recipe),
        versions=info["versions"] if "versions" in info else {},
        recipe=_recipe_lines(recipe),
        graph=graph(_nodes(recipe, stages, reads, charts)),
        evaluations=_evaluations(begun),
        live=live,
    )
    page = run_folder / "report.html"
    write_atomic(page, text.encode())
    return page


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(counted=counted, percent=percent, number=number, points=points, seconds=seconds)
    return environment.get_template("report.html.jinja")


# ----------------------------------------------------------------------------------------- the folder


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where the file is not there (yet)."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); give the run's command again to write it anew") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: an object is expected; give the run's command again to write it anew")
    return value


def _stage(folder: Path, recipe: Mapping[str, Any], looks: Mapping[str, Look]) -> StageView:
    about = _read_json(folder / "stage.json")
    name = about["name"] if about else folder.name.partition("-")[2]
    config = recipe.get("stages", {}).get(name, {})
    kind = about["kind"] if about else config.get("kind", "")
    return StageView(
        name=name,
        kind=kind,
        look=looks.get(kind, PLAIN),
        state="not run" if "left_out" in about else "done" if (folder / "manifest.json").exists() else "running",
        planned=_planned(config),
        lines=read_metrics(folder),
        rows=tuple(_eval_line(folder / "eval.json", row) for row in _read_json(folder / "eval.json").get("rows", ())),
    )


def _waiting(recipe: Mapping[str, Any], begun: tuple[StageView, ...], looks: Mapping[str, Look]) -> list[StageView]:
    left, known = recipe.get("stages", {}), {stage.name for stage in begun}
    looked = {name: looks.get(config["kind"], PLAIN) for name, config in left.items() if name not in known}
    return [
        StageView(name=name, kind=left[name]["kind"], look=look, state="waiting", planned=_planned(left[name]))
        for name, look in looked.items()
    ]


def _planned(config: Mapping[str, Any]) -> int | None:
    steps: int | None = config.get("train", {}).get("steps")
    return steps


def _eval_line(path: Path, row: Mapping[str, Any]) -> EvalLine:
    try:
        return EvalLine(**{name: row[name] for name in EvalLine.__dataclass_fields__ if name in row})
    except TypeError as error:
        raise RunError(f"{path}: a row of the table is incomplete ({error}); run the evaluation again") from error


# ---------------------------------------------------------------------------------------- its contents


def _nodes(
    recipe: Mapping[str, Any], stages: Sequence[StageView], reads: Reads, charts: Collection[str]
) -> list[StageNode]:
    """The stages as a graph, below the model that the recipe starts from: those that read no other one begin there."""
    known = {stage.name for stage in stages}
    start = str(recipe.get("model", {}).get("path", "start"))
    nodes = [StageNode(name=start, kind="base model", state="base", note="", reads=())]
    for stage in stages:
        parents = [name for name in reads.get(stage.name, ()) if name in known] or [start]
        target = stage.name if stage.rows or stage.name in charts else ""
        note = stage_note(stage)
        nodes.append(
            StageNode(name=stage.name, kind=stage.kind, state=stage.state, note=note, reads=parents, target=target)
        )
    return nodes


def _evaluations(stages: Sequence[StageView]) -> list[tuple[str, EvalLine, str]]:
    """Every row of every evaluation in order, from base to final, on one scale; none where one table has them all."""
    rows = [(stage.name, row) for stage in stages for row in stage.rows]
    if len({name for name, _ in rows}) < 2:
        return []
    _, drawn = _accuracies([row for _, row in rows])
    return [(name, row, plot) for (name, row), plot in zip(rows, drawn, strict=True)]


def _accuracies(rows: Sequence[EvalLine]) -> tuple[tuple[float, float], list[str]]:
    """The ends of a scale that has all of them, and each drawn on it."""
    ticks = nice_ticks(min(r.low for r in rows), max(r.high for r in rows) + 1e-3, 5)
    start, stop = max(0.0, ticks[0]), min(1.0, ticks[-1])
    drawn = [interval(r.low, r.accuracy, r.high, start=start, stop=stop, zero=None, tone="blue") for r in rows]
    return (start, stop), drawn


def _table(stage: StageView) -> Table:
    rows = stage.rows
    scale, plots = _accuracies(rows)
    gains = [g for r in rows for g in (r.gain_low, r.gain_high) if g is not None]
    gain_ticks = nice_ticks(min(0.0, *gains), max(1e-3, *gains), 5) if gains else []
    gain_scale = (gain_ticks[0], gain_ticks[-1]) if gains else None
    drawn = []
    for row, plot in zip(rows, plots, strict=True):
        gain = ""
        if gain_scale and row.gain is not None and row.gain_low is not None and row.gain_high is not None:
            tone = "green" if row.gain_low > 0 else "red" if row.gain_high < 0 else "grey"
            gain = interval(
                row.gain_low, row.gain, row.gain_high, start=gain_scale[0], stop=gain_scale[1], zero=0, tone=tone
            )
        drawn.append((row, plot, gain))
    known = {(name, k): None for row in rows for name, by_k in row.of_k.items() for k in by_k if k != "1"}
    last = dict(list(known))
    ks = [(name, k) for name, k in known if name == "pass" or k == last[name]]
    rewards, curves = list(dict.fromkeys(name for row in rows for name in row.rewards)), _thinking_curves(rows)
    return Table(
        stage=stage.name,
        baseline=stage.baseline.model if sum(r.gain is None for r in rows) > 1 else stage.baseline.label,
        rows=drawn,
        ks=ks,
        rewards=[name for name in rewards if any(abs(r.rewards.get(name, 2) - r.accuracy) > 1e-3 for r in rows)],
        scale=scale,
        gain_scale=gain_scale,
        steps=any(row.step not in (None, row.gain) for row in rows),
        curve=line_chart(curves, THINKING) if curves else "",
        legend=[(each.name, each.tone) for each in curves],
    )


def _thinking_curves(rows: Sequence[EvalLine]) -> list[Series]:
    """Accuracy over tokens of thinking, a curve for each model."""
    models = dict.fromkeys(row.model for row in rows if row.thinking is not None)
    return [
        Series(
            name=model, tone=tone, points=tuple((float(r.thinking or 0), r.accuracy) for r in rows if r.model == model)
        )
        for model, tone in zip(models, cycle(TONES), strict=False)
    ]


def _examples(folder: Path, stage: StageView) -> Examples | None:
    steps = rollout_steps(folder)
    if not steps:
        return None
    latest = [r for step in reversed(steps[-LATEST:]) for r in read_rollouts(folder, step) if r.reward is not None]
    ranked = sorted(latest, key=lambda r: -(r.reward or 0.0))
    best = _different_tasks(ranked)
    worst = [r for r in _different_tasks(ranked[::-1]) if best and (r.reward or 0.0) < (best[0].reward or 0.0)]
    fixed = folder / "evaluation"  # the same tasks again and again, where there is one
    probes = rollout_steps(fixed)
    early, late = _same_task(fixed, probes, read_rollouts(fixed, probes[-1])) if probes else (None, None)
    if early is None:
        early, late = _same_task(folder, steps, latest)
    return Examples(
        stage=stage.name,
        best=[_card(r) for r in best],
        worst=[_card(r) for r in worst],
        early=_card(early) if early else None,
        late=_card(late) if late else None,
    )


def _different_tasks(ranked: list[Rollout]) -> list[Rollout]:
    firsts: dict[str, Rollout] = {}
    for rollout in ranked:
        firsts.setdefault(rollout.task, rollout)
    return list(firsts.values())[:SHOWN]


def _same_task(folder: Path, steps: list[int], latest: list[Rollout]) -> tuple[Rollout | None, Rollout | None]:
    """A task of the first half of the run that was also played in the latest steps, at both: what changed most."""
    lately = {rollout.task: rollout for rollout in latest if rollout.reward is not None}
    for step in steps[: len(steps) // 2]:
        again = [task for task in rollout_tasks(folder, step) if task in lately]
        early = [r for r in read_rollouts(folder, step) if r.task in again and r.reward is not None] if again else []
        if early:
            first = min(early, key=lambda r: ((r.reward or 0.0), -(lately[r.task].reward or 0.0)))
            return first, lately[first.task]
    return None, None


def _card(rollout: Rollout) -> Card:
    prompt, completion = rollout.prompt[-LONGEST:], rollout.completion[:LONGEST]
    own = [-logprob for logprob in rollout.logprobs if logprob is not None]
    return Card(
        rollout=rollout,
        prompt=_pieces(prompt),
        completion=_pieces(completion),
        cut=len(rollout.prompt) + len(rollout.completion) - len(prompt) - len(completion),
        surprise=sum(own) / len(own) if own else None,
    )


def _pieces(text: str) -> list[tuple[str, bool]]:
    return [(piece, SPECIAL.fullmatch(piece) is not None) for piece in SPECIAL.split(text) if piece]


def _facts(info: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What identifies the run: every plain value of `run.json`, and the recipe's seed and model."""
    facts = {name.replace("_", " "): str(value) for name, value in info.items() if isinstance(value, str | int | float)}
    if "seed" in recipe:
        facts["seed"] = str(recipe["seed"])
    if "path" in recipe.get("model", {}):
        facts["model"] = recipe["model"]["path"]
    return list(facts.items())


def _recipe_lines(recipe: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The recipe as YAML, each line as (indent, key, rest)."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100) if recipe else ""
    lines = []
    for line in text.splitlines():
        match = re.match(r"(\s*(?:- )?)([^\s:'\"]+:)(.*)$", line)
        lines.append((match[1], match[2], match[3]) if match else ("", "", line))
    return lines
