"""The report's groups of charts, read from `charts.yaml`; a kind of stage names the groups that it draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from whet.tracking.charts import Chart, Curve
from whet.tracking.svg import Axis
from whet.tracking.text import number, percent, seconds, share

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
