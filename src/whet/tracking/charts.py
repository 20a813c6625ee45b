"""Charts: what one shows (`charts.yaml`, in groups that kinds of stages name), and how it is drawn from the metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from whet.tracking.svg import Axis, Point, Series, line_chart, moving_mean, smooth, stacked_chart
from whet.tracking.text import number, percent, seconds, share

Lines = Sequence[Mapping[str, float | None]]
"""The lines of a `metrics.jsonl`."""

TONES = ("blue", "orange", "green", "violet", "teal", "gold", "red", "grey")


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric in a chart. `rewards/*` stands for every metric of that form, each named by what `*` stands for."""

    metric: str
    label: str = ""
    tone: str = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One card of the report."""

    title: str
    caption: str
    axis: Axis
    curves: tuple[Curve, ...]
    stacked: bool = False
    band: tuple[str, str] | None = None
    """Metrics of the lower and upper edge of a shaded range."""
    section: str = "Learning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the report shows a kind of stage."""

    charts: tuple[Chart, ...] = ()
    """Whatever else is logged is drawn after them, under its own name."""
    headline: tuple[tuple[str, str, Callable[[float], str]], ...] = ()
    """(metric, what it is, how it is written): the first one that there is says how the stage went."""
    makes_rows: bool = False
    """Whether its steps are chunks of tasks and it trains nothing."""


PLAIN = Look()
"""Every metric on its own."""
ROWS_LOOK = Look(makes_rows=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A drawn card."""

    title: str
    caption: str
    svg: str
    now: str
    """Where its first curve, as it is drawn, ends; for a stack the sum."""
    before: str
    """Where it begins."""
    legend: tuple[tuple[str, str], ...]
    """(label, tone) of each curve, where a title is not enough."""


HIDDEN = {"step", "time_s", "num_tokens", "outcomes/finished"}
"""Not worth a curve: clocks, counters, and the complement of what is shown."""
FEW = 7
"""Cards that need no headings between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The cards of a stage."""

    sections: Mapping[str, Sequence[Panel]]
    """By section; a stage with few cards has one section without a name. `More` holds what is in no chart."""
    left_out: Sequence[str]
    """Charts that would say nothing, each with the reason: its numbers never change, or another chart has them."""


def board(lines: Lines, charts: Sequence[Chart]) -> Board:
    """Draw the charts that there is data for, then whatever else was logged."""
    known = _names(lines) - HIDDEN
    others = known.difference(*(_used(chart, known) for chart in charts))
    sections: dict[str, list[Panel]] = {}
    left_out: list[str] = []
    drawn: dict[tuple[Point, ...], str] = {}
    for chart in (*charts, *map(_plain, sorted(others))):
        series = _distinct(_series(chart, lines, known))
        why = _idle(chart, series, drawn) if drawn and not known.intersection(chart.band or ()) else ""
        panel = None if why else _draw(chart, series, lines)
        if panel is not None:
            sections.setdefault(chart.section, []).append(panel)
            drawn = {s.points: chart.title for s in series} | drawn
        elif why:
            left_out.append(f"{chart.title} ({why})")
        known -= _used(chart, known)
    more = {name: sections.pop(name) for name in ("More",) if name in sections}
    if 0 < sum(map(len, sections.values())) <= FEW:
        sections = {"": [card for cards in sections.values() for card in cards]}
    return Board(sections=sections | more, left_out=left_out)


def _plain(metric: str) -> Chart:
    curve = Curve(metric=metric, label=metric, tone="grey")
    return Chart(title=metric, caption="", axis=Axis(label="", show=number), curves=(curve,), section="More")


def _distinct(series: Sequence[Series]) -> list[Series]:
    """The first of those that have the same points: the total of one reward is that reward."""
    return list({s.points: s for s in reversed(series)}.values())[::-1]


def _idle(chart: Chart, series: Sequence[Series], drawn: Mapping[tuple[Point, ...], str]) -> str:
    """Why a chart says nothing; empty where it does, and where there is nothing to draw."""
    if not series:
        return ""
    if all(s.points in drawn for s in series):
        return f"as in {drawn[series[0].points]}"
    values = [{y for _, y in s.points} for s in series]
    if all(len(s.points) > 1 and len(heights) == 1 for s, heights in zip(series, values, strict=True)):
        return f"{', '.join(chart.axis.show(heights.pop()) for heights in values)} throughout"
    return ""


def points(lines: Lines, metric: str) -> tuple[Point, ...]:
    """The metric's (step, value) points, where it is there and finite; the last line of a step counts."""
    found = {line["step"]: line.get(metric) for line in lines if line.get(metric) is not None}
    return tuple((float(step), float(value)) for step, value in found.items() if step is not None and value is not None)


def ends(points: Sequence[Point]) -> tuple[float, float]:
    """Where the curve that is drawn through the points begins and ends."""
    curve = smooth(points)
    return curve[0][1], curve[-1][1]


def _names(lines: Lines) -> set[str]:
    return {name for line in lines for name, value in line.items() if value is not None}


def _matching(metric: str, names: Iterable[str]) -> list[str]:
    form = re.compile(re.escape(metric).replace(r"\*", "[^/]+"))
    return sorted(name for name in names if form.fullmatch(name))


def _used(chart: Chart, names: set[str]) -> set[str]:
    metrics = [*(curve.metric for curve in chart.curves), *(chart.band or ())]
    return {name for metric in metrics for name in _matching(metric, names)}


def _draw(chart: Chart, series: list[Series], lines: Lines) -> Panel | None:
    if not series:
        return None
    if chart.stacked:
        # Hidden metrics count here: at a step where all episodes finished, none failed.
        steps = {line["step"] for line in lines if _used(chart, _names([line]))}
        series = _filled(series, sorted(float(step) for step in steps if step is not None))
        if not any(y for s in series for _, y in s.points):
            return None
        svg = stacked_chart(series, chart.axis)
        first, last = (sum(moving_mean(s.points)[end][1] for s in series) for end in (0, -1))
    else:
        edges = [Series(name=m.rpartition("/")[2].replace("_", " "), points=points(lines, m), tone="blue")
                 for m in chart.band or ()]  # fmt: skip
        band = (edges[0], edges[1]) if edges and all(edge.points for edge in edges) else None
        svg = line_chart(series, chart.axis, band=band)
        first, last = ends(series[0].points)
    return Panel(
        title=chart.title,
        caption=chart.caption,
        svg=svg,
        now=chart.axis.show(last),
        before=chart.axis.show(first),
        legend=tuple((s.name, s.tone) for s in series) if len(series) > 1 or chart.stacked else (),
    )


def _series(chart: Chart, lines: Lines, names: set[str]) -> list[Series]:
    """The chart's curves that have points; those of a `*` take the tones that the others left."""
    series: list[Series] = []
    for curve in chart.curves:
        spare = [tone for tone in TONES if tone not in {s.tone for s in series}]
        for index, name in enumerate(_matching(curve.metric, names)):
            several = "*" in curve.metric
            label = name[curve.metric.index("*") :].replace("_", " ") if several else curve.label
            tone = spare[index % len(spare)] if several else curve.tone
            series.append(Series(name=label, points=points(lines, name), tone=tone))
    return [s for s in series if s.points]


def _filled(series: list[Series], steps: Sequence[float]) -> list[Series]:
    """The same series, the largest first, with 0 at the other `steps`: what did not happen took nothing."""
    series = sorted(series, key=lambda s: -sum(y for _, y in s.points))
    filled = []
    for s in series:
        value = dict(s.points)
        filled.append(
            Series(name=s.name, points=tuple((x, value[x] if x in value else 0.0) for x in steps), tone=s.tone)
        )
    return filled


SHOW = {"number": number, "share": share, "seconds": seconds}


def _chart(given: Mapping[str, Any]) -> Chart:
    axis = {"show": "number", **given["axis"]}
    return Chart(**{
        **given,
        "axis": Axis(**{**axis, "show": SHOW[axis["show"]]}),
        "curves": tuple(Curve(**curve) for curve in given["curves"]),
        "band": tuple(given["band"]) if "band" in given else None,
    })  # fmt: skip


_GROUPS = yaml.safe_load((Path(__file__).parent / "charts.yaml").read_text(encoding="utf-8"))
IMITATION, JUDGEMENT, PREFERENCES, TRAINING = (
    tuple(map(_chart, _GROUPS[name])) for name in ("imitation", "judgement", "preferences", "training")
)
"""Learning from rows; a reward model's; learning from comparisons; every stage that trains."""
HELD_OUT_TASKS = ("eval_solved", "the solved share of held-out tasks", percent)
"""The headline of a stage that plays them on its way."""
