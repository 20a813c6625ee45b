"""`whet demo`."""

from __future__ import annotations

from whet.cli.errors import print_json
from whet.cli.options import Json, Quiet


def demo(json: Json = False, quiet: Quiet = False) -> None:
    """Train the shipped tiny model on this machine and watch it learn, in about two minutes."""
    from whet.launch.main import demo as launch_demo

    result = launch_demo(quiet=quiet or json)
    if json:
        print_json(result)
