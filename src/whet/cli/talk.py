"""`whet chat`, `whet serve` and `whet env`: models that answer, and environments played by hand."""

from __future__ import annotations

import sys
from dataclasses import asdict
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
        Path | None, typer.Option(help="A Jinja file, whet:hermes or whet:tags, in place of the model's own.")
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


def serve(
    what: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A run folder, RUN@stage, a model directory, a hub id; NAME=MODEL."),
    ],
    host: Annotated[
        str, typer.Option(help="Listen on this address; one beyond this machine needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the key that requests must send.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, whatever is asked.", min=1)] = 2048,
    concurrency: Annotated[int, typer.Option(help="Requests under way together; more are answered 429.", min=1)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds in which a request is answered.", min=1)] = 600.0,
    json: Json = False,
) -> None:
    """Serve models by OpenAI's chat completions, until Ctrl-C."""
    from whet.launch.serve import open_server
    from whet.serving.app import Bounds, listen, runner

    listening, bounds = listen(host, port), Bounds(answer_s=timeout, concurrency=concurrency)
    server, about = open_server(what, host=host, key_env=api_key_env, max_tokens=max_tokens, bounds=bounds)
    running = runner(server)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    if json:
        print_json({"url": url, "models": list(about)})
    else:
        lines = [*(f"{name}: {text}" for name, text in about.items()), f"serving at {url}; Ctrl-C ends it"]
        print("\n".join(map(one_line, lines)), file=sys.stderr, flush=True)
    running.run(sockets=[listening])


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
