"""`whet demo`: the main job on a laptop, in about a minute, with what the package ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.config.loading import load_recipe
from whet.launch.main import run_recipe

RECIPE = Path(__file__).parent.parent / "assets" / "demo.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Where the run is, and its evaluation table (`eval.json`)."""

    run: str
    report: str
    evaluation: dict[str, Any]


def demo(*, seed: int = 0, out: Path | None = None, quiet: bool = False) -> DemoResult:
    """Run the demo recipe, or show again what it made; another seed is another run."""
    folder = out or Path("runs") / f"demo-seed{seed}"
    result = run_recipe(load_recipe(RECIPE, [f"seed={seed}", f"out={folder}"]), quiet=quiet)
    return DemoResult(run=result["run"], report=result["report"], evaluation=result["evaluations"]["eval"])
