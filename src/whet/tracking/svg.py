"""Small SVG charts for a page that must work without scripts and without a network.

Colours are CSS classes (`tone-blue` ...), so that the page's light and dark themes reach into a chart. Hovering is CSS
too: invisible columns over the plot, each of which reveals its own crosshair and values. Text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

WIDTH, HEIGHT = 420, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 410, 22, 164
MOST_POINTS = 400
"""Longer curves are drawn through the means of this many pieces."""
MOST_TIPS = 48
"""Hover columns of one chart; beyond that they are too narrow to hit."""

Show = Callable[[float], str]
"""A number as text, for ticks and tips."""


Point = tuple[float, float]
"""(step, value)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: points in order of steps, all finite."""

    name: str
    points: tuple[Point, ...]
    tone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The vertical axis: what it measures, how its numbers read, and limits that hold whatever the data."""

    label: str
    show: Show
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False
    along: str = "step"
    """What the horizontal axis counts."""


def line_chart(series: Sequence[Series], axis: Axis, *, band: tuple[Series, Series] | None = None) -> str:
    """Curves over steps. Many noisy points are drawn pale, with their moving mean on top; `band` is a shaded range."""
    limits = [*series, *(band or ())]
    frame = _Frame.around([p for s in limits for p in s.points], axis)
    body = []
    if band:
        body.append(_area(frame, band[0].points, band[1].points, band[0].tone, "band"))
    for s in series:
        if _is_noisy(s.points):
            body.append(_curve(frame, _thinned(s.points), s.tone, "raw"))
        body.append(_curve(frame, _thinned(smooth(s.points)), s.tone, "curve"))
    return _chart(frame, body, [(s, s.points) for s in limits], [s.name for s in series])


def smooth(points: Sequence[Point]) -> list[Point]:
    """The points, or their moving mean where they are noisy: the line that is drawn."""
    return moving_mean(points) if _is_noisy(points) else list(points)


def moving_mean(points: Sequence[Point]) -> list[Point]:
    """Centred means over a tenth of the curve, so that peaks do not move; curves below 20 points stay as they are."""
    reach = len(points) // 20
    if not reach:
        return list(points)
    sums = [0.0, *accumulate(y for _, y in points)]
    mean = []
    for i, (x, _) in enumerate(points):
        start, stop = max(0, i - reach), min(len(points), i + reach + 1)
        mean.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return mean


def stacked_chart(series: Sequence[Series], axis: Axis) -> str:
    """Areas on top of each other, smoothed like curves. Every series must have the same steps."""
    steps = [x for x, _ in series[0].points]
    assert all([x for x, _ in s.points] == steps for s in series), "stacked series share their steps"
    below = [(x, 0.0) for x in steps]
    layers = []
    for s in series:
        above = [(x, y + base) for (x, y), (_, base) in zip(moving_mean(s.points), below, strict=True)]
        layers.append((s, below, above))
        below = above
    frame = _Frame.around([(steps[0], 0.0), *below], axis)
    body = [_area(frame, _thinned(low), _thinned(high), s.tone, "layer") for s, low, high in layers]
    return _chart(frame, body, [(s, high) for s, _, high in layers], [s.name for s in series])


def interval(low: float, mean: float, high: float, *, start: float, stop: float, zero: float | None, tone: str) -> str:
    """A dot with its interval on a line from `start` to `stop`; `zero` draws a thin mark of reference."""

    def x(value: float) -> float:
        return 6 + 112 * (min(max(value, start), stop) - start) / (stop - start)

    mark = f'<line class="zero" x1="{x(zero):.1f}" x2="{x(zero):.1f}" y1="1" y2="23"/>' if zero is not None else ""
    return (
        f'<svg class="interval tone-{tone}" viewBox="0 0 124 24" role="img" aria-label="interval">'
        f'<line class="rail" x1="6" x2="118" y1="12" y2="12"/>{mark}'
        f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="12" y2="12"/>'
        f'<circle class="dot" cx="{x(mean):.1f}" cy="12" r="5"/></svg>'
    )


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers that span [low, high], the first at or below it and the last at or above."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            break
    return [round(index * step, 12) for index in range(first, last + 1)]


# ------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where numbers lie on the paper."""

    axis: Axis
    start: float
    stop: float
    ticks: list[float]

    @classmethod
    def around(cls, points: Sequence[Point], axis: Axis) -> _Frame:
        steps, values = [x for x, _ in points], [y for _, y in points]
        start, stop = min(steps), max(steps)
        if start == stop:
            start, stop = start - 1, stop + 1
        if axis.log:
            positive = [y for y in values if y > 0] or [1.0]
            first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
            stride = max(1, math.ceil((last - first) / 4))
            return cls(axis, start, stop, [10.0**e for e in range(first, max(last, first + 1) + stride, stride)])
        low = min(values) if axis.floor is None else axis.floor
        high = max(values) if axis.ceiling is None else axis.ceiling
        if high - low < 1e-12:
            low, high = (low, low + 1) if axis.floor is not None else (low - 0.5, low + 0.5)
        return cls(axis, start, stop, nice_ticks(low, high, 5))

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - self.start) / (self.stop - self.start)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.axis.log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        share = (value - low) / (high - low)
        return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share))


def _path(frame: _Frame, points: Sequence[Point]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _curve(frame: _Frame, points: Sequence[Point], tone: str, kind: str) -> str:
    if len(points) == 1:
        (x, y) = points[0]
        return f'<circle class="dot tone-{tone}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4"/>'
    return f'<polyline class="{kind} tone-{tone}" points="{_path(frame, points)}"/>'


def _area(frame: _Frame, low: Sequence[Point], high: Sequence[Point], tone: str, kind: str) -> str:
    outline = [*_thinned(low), *reversed(_thinned(high))]
    return f'<polygon class="{kind} tone-{tone}" points="{_path(frame, outline)}"/>'


def _thinned(points: Sequence[Point]) -> list[Point]:
    """The points, or the means of `MOST_POINTS` runs of neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    cuts = [round(piece * len(points) / MOST_POINTS) for piece in range(MOST_POINTS + 1)]
    pieces = [points[a:b] for a, b in pairwise(cuts)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _is_noisy(points: Sequence[Point]) -> bool:
    """Whether the curve goes up and down more than a few sweeps of its range would."""
    values = [y for _, y in points]
    travelled = sum(abs(b - a) for a, b in pairwise(values))
    return travelled > 3 * (max(values) - min(values))


# -------------------------------------------------------------------------------------------- drawing


def _chart(
    frame: _Frame, body: list[str], shown: Sequence[tuple[Series, Sequence[Point]]], names: Sequence[str]
) -> str:
    """Axes, curves and hover columns. `shown` pairs each series with the heights at which its dots go."""
    what = escape(f"{', '.join(names)} by {frame.axis.along}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what}">'
        + "".join([*_axes(frame), *body, *_tips(frame, shown)])
        + "</svg>"
    )


def _axes(frame: _Frame) -> list[str]:
    parts = [f'<text class="label" x="4" y="11">{escape(frame.axis.label)}</text>']
    for tick in frame.ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 3.5:.1f}">{escape(frame.axis.show(tick))}</text>')
    steps = [s for s in nice_ticks(frame.start, frame.stop, 7) if frame.start <= s <= frame.stop and s == round(s)]
    parts += [f'<text class="tick middle" x="{frame.x(s):.1f}" y="{BOTTOM + 15}">{s:,.0f}</text>' for s in steps]
    parts.append(f'<text class="label end" x="{RIGHT}" y="{BOTTOM + 29}">{escape(frame.axis.along)}</text>')
    return parts


def _tips(frame: _Frame, shown: Sequence[tuple[Series, Sequence[Point]]]) -> list[str]:
    """For each hover column the crosshair, a dot on each curve, and a box with the values at that step."""
    steps = sorted({x for s, _ in shown for x, _ in s.points})
    picked = [steps[round(i * (len(steps) - 1) / max(1, MOST_TIPS - 1))] for i in range(MOST_TIPS)]
    columns = sorted(set(picked)) if len(steps) > MOST_TIPS else steps
    values = [(s, dict(s.points), dict(heights)) for s, heights in shown]
    edges = [(a + b) / 2 for a, b in pairwise(columns)]
    tips = []
    for step, left, right in zip(columns, [frame.start, *edges], [*edges, frame.stop], strict=True):
        here = [(s, value[step], height[step]) for s, value, height in values if step in value]
        dots = "".join(
            f'<circle class="dot tone-{s.tone}" cx="{frame.x(step):.1f}" cy="{frame.y(height):.1f}" r="3"/>'
            for s, _, height in here
        )
        x, width = frame.x(left), frame.x(right) - frame.x(left)
        tips.append(
            f'<g class="hit"><rect x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{BOTTOM - TOP}"/><g class="tip">'
            f'<line x1="{frame.x(step):.1f}" x2="{frame.x(step):.1f}" y1="{TOP}" y2="{BOTTOM}"/>{dots}'
            f"{_tip_box(frame, step, [(s.name, frame.axis.show(value)) for s, value, _ in here])}</g></g>"
        )
    return tips


def _tip_box(frame: _Frame, step: float, rows: list[tuple[str, str]]) -> str:
    lines = [f"{frame.axis.along} {step:,.0f}", *(f"{name}  {value}" for name, value in rows)]
    width = 5.6 * max(len(line) for line in lines) + 14
    right_side = frame.x(step) < (LEFT + RIGHT) / 2
    x = frame.x(step) + 8 if right_side else frame.x(step) - 8 - width
    spans = "".join(
        f'<tspan x="{x + 7:.1f}" dy="{13 if i else 0}">{escape(line)}</tspan>' for i, line in enumerate(lines)
    )
    box = f'<rect class="box" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{13 * len(lines) + 7}" rx="4"/>'
    return f'{box}<text y="{TOP + 13}">{spans}</text>'
