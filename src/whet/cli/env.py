"""`whet env`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from whet.cli.errors import print_json, printable
from whet.cli.options import Json


def env(
    path: Annotated[
        str, typer.Argument(metavar="FILE:CLASS", help="The class of the environment, or its section: {kind: sql}.")
    ],
    turn: Annotated[
        list[str] | None,
        typer.Option("--turn", "-t", help='A turn of a play: TOOL={"argument": value}, or text; may be repeated.'),
    ] = None,
    row: Annotated[str, typer.Option(help="The columns of the task, as JSON or YAML.")] = "",
    options: Annotated[str, typer.Option(help="What load, or the constructor, is given.")] = "",
    prompt: Annotated[str, typer.Option(help="The task's message.")] = "Begin.",
    rows: Annotated[Path | None, typer.Option(help="Write the tasks that it has to this file of JSON lines.")] = None,
    json: Json = False,
) -> None:
    """The tools of an environment, and with --turn a play by hand: twice, each in its own process, and compared."""
    from whet.launch.environment import try_environment, write_rows

    if rows is not None:
        count = write_rows(path, options, rows)
        if json:
            print_json({"rows": rows, "count": count})
        else:
            print(f"{count:,} tasks in {rows}")
        return
    looked = try_environment(path, options, row, turn or [], prompt)
    if json:
        print_json(asdict(looked))
        return
    for function in (tool["function"] for tool in looked.tools):
        named = ", ".join(function["parameters"]["properties"])
        print(f"{function['name']}({named})  {printable(function['description'])}")
    print(f"other methods: {', '.join(looked.hooks) or 'none'}; columns that reset takes: {looked.columns}")
    print("\n".join(f"  {printable(line)}" for line in looked.play))
    if looked.play:
        print(f"a second process {'played the same' if looked.same else 'played otherwise: draw by the seed'}")
    print(f"loaded in {looked.load_ms:.0f} ms" + (f", played in {looked.play_ms:.0f} ms" if looked.play else ""))
