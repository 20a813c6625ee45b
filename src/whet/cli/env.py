"""`whet env`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whet.cli.errors import print_json, printable
from whet.cli.options import Json

if TYPE_CHECKING:  # `whet --help` imports this file and must not pay for it
    from whet.launch.environment import Looked, Tried


def env(
    path: Annotated[str, typer.Argument(metavar="FILE:CLASS", help="The class of the environment, shop.py:Shop.")],
    turn: Annotated[
        list[str] | None,
        typer.Option("--turn", "-t", help='A turn of a play: TOOL={"argument": value}, or text; may be repeated.'),
    ] = None,
    row: Annotated[str, typer.Option(help="The columns of the task, as JSON or YAML.")] = "",
    options: Annotated[str, typer.Option(help="What load, or the constructor, is given.")] = "",
    prompt: Annotated[str, typer.Option(help="The task's message.")] = "Begin.",
    json: Json = False,
) -> None:
    """The tools of an environment, and with --turn a play by hand: twice, each in its own process, and compared."""
    from whet.launch.environment import try_environment

    looked = try_environment(path, options, row, turn or [], prompt)
    if json:
        print_json(asdict(looked))
        return
    for tool in looked.tools:
        print(_signature(tool["function"]))
    print(f"other methods: {', '.join(looked.hooks) or 'none'}; columns that reset takes: {looked.columns}")
    if looked.first is not None and looked.second is not None:
        _print_play(looked, looked.first, looked.second)
    else:
        print(f"loaded in {looked.load_ms:.0f} ms")


def _print_play(looked: Looked, first: Tried, second: Tried) -> None:
    for message in first.messages:
        calls = "".join(f" {call.name} {dict(call.arguments)} [{call.status}]" for call in message.tool_calls)
        print(f"  {message.role}:{' ' if message.content else ''}{printable(message.content)}{printable(calls)}")
    print(f"rewards of turns {list(first.rewards)}, of the play {dict(first.worth)}, states {list(first.states)}")
    if first.failure:
        print(f"it broke off, {printable(first.failure)}")
    verdict = "went the same way" if first.same(second) else "differ: what is random in it does not follow from a seed"
    print(f"two processes {verdict}")
    print(f"loaded in {looked.load_ms:.0f} ms, started in {first.start_ms:.1f} ms, {first.turn_ms:.1f} ms a turn")


def _signature(function: dict[str, Any]) -> str:
    parameters = function["parameters"]
    required = parameters.get("required", [])
    named = (
        f"{name}{'' if name in required else '?'}: {value.get('type') or ' or '.join(_types(value))}"
        for name, value in parameters["properties"].items()
    )
    return f"{function['name']}({', '.join(named)})  {printable(function['description'])}"


def _types(schema: dict[str, Any]) -> list[str]:
    return [str(each.get("type", "object")) for each in schema.get("anyOf", [{}])]
