"""The graph of a run's stages as SVG: one row a stage in order, what it reads as lines from the rows above.

A line to the next row is straight; the others leave their row into a lane of their own on the left and come back at
every row that reads it. So the drawing is as narrow as a phone, however many stages there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, LANE = 420, 30, 13
MOST_LANES = 6
"""Further parents share the last one."""
LONGEST = 21
"""Characters shown of a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNode:
    """A stage, or the model that all begins with."""

    name: str
    kind: str
    state: str
    """done, running, waiting, not run, or base."""
    note: str
    """How far it is, or what it came to."""
    reads: Sequence[str]
    """Names of nodes before it."""
    target: str = ""
    """The id of its section on the page; empty: it has none."""


def graph(nodes: Sequence[StageNode]) -> str:
    """The drawing; empty where there are fewer than two nodes."""
    if len(nodes) < 2:
        return ""
    place = {node.name: index for index, node in enumerate(nodes)}
    readers: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        for name in node.reads:
            readers.setdefault(place[name], []).append(index)
    lanes = _lanes(readers)
    left = 10 + LANE * (1 + max(lanes.values(), default=-1))
    lines = [_lines(parent, children, lanes.get(parent), left) for parent, children in readers.items()]
    rows = [_row(node, _y(index), left) for index, node in enumerate(nodes)]
    height = ROW * len(nodes) + 4
    return (
        f'<svg class="graph" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="the stages and what they read">'
        + "".join([*lines, *rows])
        + "</svg>"
    )


def _y(index: int) -> float:
    return ROW * index + ROW / 2 + 2


def _lanes(readers: dict[int, list[int]]) -> dict[int, int]:
    """A lane (0: nearest) for each parent that a row below the next one reads; short lines are nearest."""
    far = {parent: max(children) for parent, children in readers.items() if max(children) > parent + 1}
    lanes: dict[int, int] = {}
    for parent in sorted(far, key=lambda each: (far[each] - each, each)):
        taken = {lane for other, lane in lanes.items() if parent < far[other] and other < far[parent]}
        free = (lane for lane in range(MOST_LANES) if lane not in taken)
        lanes[parent] = next(free, MOST_LANES - 1)
    return lanes


def _lines(parent: int, children: Sequence[int], lane: int | None, left: float) -> str:
    paths = [f"M{left} {_y(parent)}V{_y(parent + 1)}"] if parent + 1 in children else []
    x = left - LANE * (1 + (lane or 0))
    for child in (child for child in children if child > parent + 1):
        start, end = _y(parent), _y(child)
        paths.append(f"M{left} {start}Q{x} {start} {x} {start + 12}V{end - 12}Q{x} {end} {left} {end}")
    return f'<path class="edge" d="{"".join(paths)}"/>'


def _row(node: StageNode, y: float, left: float) -> str:
    shown = node.name if len(node.name) <= LONGEST else node.name[: LONGEST - 1] + "…"
    kind = "" if node.kind == node.name else f'<tspan class="kind" dx="8">{escape(node.kind)}</tspan>'
    row = (
        f'<g class="node {node.state.replace(" ", "-")}"><title>{escape(node.name)}: {escape(node.note)}</title>'
        f'<rect x="{left + 10}" y="{y - ROW / 2 + 1}" width="{WIDTH - left - 10}" height="{ROW - 2}" rx="6"/>'
        f'<circle cx="{left}" cy="{y}" r="5"/><text x="{left + 16}" y="{y + 4.5}">{escape(shown)}{kind}</text>'
        f'<text class="note" x="{WIDTH - 6}" y="{y + 4.5}">{escape(node.note)}</text></g>'
    )
    return f'<a href="#{escape(node.target)}">{row}</a>' if node.target else row
