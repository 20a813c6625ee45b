"""`whet chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from whet.cli.errors import one_line, print_json, printable
from whet.cli.options import Json


def chat(
    what: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, RUN@stage, a model directory, a hub id or whet:demo.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Say this and print the answer; may be repeated.")
    ] = None,
    system: Annotated[str, typer.Option(help="A system message that every conversation begins with.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    env: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:CLASS", help="An environment whose tools run when called; or its section, {kind: sql}."
        ),
    ] = None,
    row: Annotated[str, typer.Option(help="The columns of the environment's task, as JSON or YAML.")] = "",
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file, or whet:hermes, :tags or :inline, in place of the model's own.")
    ] = None,
    json: Json = False,
) -> None:
    """Talk to what a run made, or has made so far. An empty line or Ctrl-D ends it, /reset begins anew."""
    from whet.config import SamplingConfig
    from whet.launch.environment import mapping, section_of
    from whet.launch.talk import open_conversation

    sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
    tools = None if env is None else section_of(env)
    conversation = open_conversation(
        what,
        sampling,
        seed=seed,
        system=system,
        environment=tools,
        row=mapping("--row", row),
        chat_template=chat_template,
    )
    if not json and (conversation.unfinished or not prompt):
        print("\n".join(map(one_line, conversation.describe()[: 1 if prompt else None])), file=sys.stderr, flush=True)
    answers = [conversation.say(text) for text in prompt or ()]
    while not prompt and (text := _read()):
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/") and " " not in text:
            print(f"{one_line(text)}: no such command; there is /reset", file=sys.stderr, flush=True)
        else:
            answers.append(conversation.say(text))
            if not json:
                print(printable(answers[-1]), flush=True)
    if json:
        print_json({"model": conversation.about, "answers": answers})
    elif prompt:
        print("\n".join(map(printable, answers)))


def _read() -> str:
    """The next line typed or piped in; empty at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
