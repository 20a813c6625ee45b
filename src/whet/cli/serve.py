"""`whet serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json


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
