"""`whet demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whet.cli.errors import print_json
from whet.cli.options import Json, Quiet
from whet.cli.tables import evaluation_table


def demo(
    seed: Annotated[int, typer.Option(help="Another seed is another run.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/demo-seedN by default.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Watch the shipped tiny base model learn to reason, by SFT and then RL, in about a minute."""
    from dataclasses import asdict

    from rich.console import Console

    from whet.launch.demo import demo as launch_demo

    result = launch_demo(seed=seed, out=out, quiet=quiet or json)
    if json:
        print_json(asdict(result))
        return
    console = Console(highlight=False)
    console.print(evaluation_table(result.evaluation))
    console.print()
    console.print(f"Everything about it:  {result.report}", markup=False, soft_wrap=True)
    console.print(f"Talk to it:           whet chat {result.run} -p 58+67", markup=False, soft_wrap=True)
