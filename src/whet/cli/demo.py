"""`whet demo`: the main job on a laptop, in about a minute, with what the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json, Quiet
from whet.cli.tables import evaluation_table

RECIPE = Path(__file__).parent.parent / "assets" / "demo.yaml"


def demo(
    seed: Annotated[int, typer.Option(help="Another seed is another run.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/demo-seedN by default.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Watch the shipped tiny base model learn to reason, by SFT and then RL, in about a minute."""
    from rich.console import Console

    from whet.launch.python import run

    folder = out or Path("runs") / f"demo-seed{seed}"
    evaluation = run(RECIPE, f"seed={seed}", f"out={folder}", quiet=quiet or json).evaluations["eval"]
    report = folder / "report.html"
    if json:
        print_json({"run": folder, "report": report, "evaluation": evaluation})
        return
    console = Console(highlight=False)
    console.print(evaluation_table(evaluation))
    console.print()
    console.print(f"Everything about it:  {report}", markup=False, soft_wrap=True)
    console.print(f"Talk to it:           whet chat {folder} -p 58+67", markup=False, soft_wrap=True)
