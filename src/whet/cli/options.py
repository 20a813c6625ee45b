"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Options that a command does not know are left among its arguments, where `split_overrides` reads `--train.lr 2e-5`.
OVERRIDABLE = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values put over the recipe's: train.lr=2e-5, stages.rl.algorithm=grpo (or --train.lr 2e-5).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line, the last on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and the result.")]
