"""`whet`: what is heavy is imported when a command runs, so that `whet --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from whet import __version__
from whet.cli import chat, check, env, eval, launch, plan, reward, run, runs, schema, serve
from whet.cli.errors import exit_codes, guarded
from whet.cli.options import OVERRIDABLE

USUAL = {"GOMP_SPINCOUNT": "1000", "TRANSFORMERS_VERBOSITY": "error"}
"""For GNU OpenMP, which reads it when torch is loaded: threads that wait for one another soon sleep. By default they
spin for milliseconds, so that on a busy machine two threads take six times as long as one (docs/benchmarks.md).
transformers warns of what is no fault of a user's, such as the wording of a published configuration."""

app = typer.Typer(
    name="whet",
    help="Post-training for language models: SFT, preference alignment and RL from one recipe file.",
    epilog=f"Exit codes: {exit_codes()}.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose (also after the command).")
    ] = False,
) -> None:
    """Options of every command."""
    if version:
        print(f"whet {__version__}")
        raise typer.Exit


app.command(context_settings=OVERRIDABLE)(run.run)
app.command(context_settings=OVERRIDABLE)(plan.plan)
app.command(context_settings=OVERRIDABLE)(check.check)
app.command("eval", context_settings=OVERRIDABLE)(eval.evaluate)
app.command(context_settings=OVERRIDABLE)(reward.reward)
app.command(context_settings=OVERRIDABLE)(reward.regrade)
app.command(context_settings=OVERRIDABLE)(launch.launch)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(env.env)
app.command()(runs.compare)
app.command()(run.demo)
for each in (runs.runs, runs.show, runs.diff, runs.gc):
    app.command()(each)
app.command()(schema.schema)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: run the command and exit with its code."""
    for name, value in USUAL.items():
        os.environ.setdefault(name, value)
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]

    def command() -> int:
        return app(words, prog_name="whet", standalone_mode=False) or 0

    sys.exit(guarded(command, as_json="--json" in words, show_traceback=show_traceback))
