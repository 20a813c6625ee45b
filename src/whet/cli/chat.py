"""`whet chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def chat(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a model directory.")]) -> None:
    """Talk to what a run made."""
    from whet.launch.main import chat as launch_chat

    launch_chat(run)
