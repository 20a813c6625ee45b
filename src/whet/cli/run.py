"""`whet run`, `whet demo` (the main job on a laptop, in about a minute), `whet eval` and `whet launch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shutil import which
from typing import Annotated

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json, Overrides, Quiet, RecipeFile
from whet.cli.tables import evaluation_table
from whet.errors import ConfigError

Accept = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE.KEY", help="Go on though this differs from what the stage began with (repeatable)."),
]
Restart = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE", help="Start this stage over, and all that read what it made (repeatable)."),
]


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    accept: Accept = None,
    restart: Restart = None,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Take stages of the same identity from the runs in here, e.g. runs."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe's stages in order. A run that was stopped goes on where it was; finished stages are skipped."""
    from whet.config.loading import load_recipe
    from whet.launch.main import run_recipe
    from whet.pipeline.lineage import Choices

    choices = Choices(accept=accept or (), restart=restart or (), reuse=reuse)
    result = run_recipe(load_recipe(recipe, overrides or ()), quiet=quiet or json, choices=choices)
    if json:
        print_json(result)


RECIPE = Path(__file__).parent.parent / "assets" / "demo.yaml"


def demo(
    seed: Annotated[int, typer.Option(help="Another seed is another run.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/demo-seedN by default.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Watch the shipped tiny base model learn to reason, by SFT and then RL, in about a minute."""
    from rich.console import Console

    from whet.launch.python import run as launch_run

    folder = out or Path("runs") / f"demo-seed{seed}"
    evaluation = launch_run(RECIPE, f"seed={seed}", f"out={folder}", quiet=quiet or json).evaluations["eval"]
    report = folder / "report.html"
    if json:
        print_json({"run": folder, "report": report, "evaluation": evaluation})
        return
    console = Console(highlight=False)
    console.print(evaluation_table(evaluation))
    console.print()
    console.print(f"Everything about it:  {report}", markup=False, soft_wrap=True)
    console.print(f"Talk to it:           {_here()} chat {folder} -p 58+67", markup=False, soft_wrap=True)


def _here() -> str:
    """What starts this program in the shell that it was started from."""
    beside = Path(sys.executable).with_name("whet")
    found = which("whet")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "whet"
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m whet"


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="LABEL=PATH, may be repeated: a run, RUN@stage, a directory or a hub id."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Only a recipe's evaluation, on models that are there already: the stage's own, or those given.

    A file of rows in the recipe's place: their held-out loss under the models given.
    """
    from rich.console import Console

    from whet.config.loading import load_recipe
    from whet.launch.evaluate import evaluate as launch_evaluate
    from whet.launch.evaluate import load_rows

    models: dict[str, str] = {}
    for label, path in map(_labelled, model or ()):
        if label in models:
            raise ConfigError(f"--model {label}={path}: the label is taken by {models[label]}; give each its own")
        models[label] = path
    rows = recipe.suffix not in (".yaml", ".yml", "") or recipe.is_dir()
    loaded = load_rows(recipe, models, overrides or ()) if rows else load_recipe(recipe, overrides or ())
    table = launch_evaluate(loaded, models, quiet=quiet or json)
    if json:
        print_json({"evaluation": table})
    else:
        Console(highlight=False).print(evaluation_table(table))


def _labelled(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    if not (label and equals and path):
        raise ConfigError(f"--model {text}: write LABEL=PATH, for example rl=runs/demo-seed0@rl")
    return label, path


Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="slurm, kubernetes, skypilot or ray.", show_default=False)
]


def launch(
    target: Target,
    recipe: RecipeFile,
    words: Overrides = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write.", show_default=False)] = None,
    template: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own template.")] = None,
    eject: Annotated[bool, typer.Option("--eject", help="Write the template itself, to change it.")] = False,
    server_gpus: Annotated[int, typer.Option(min=0, help="GPUs of a vLLM server beside the ranks; 0: none.")] = 0,
    image: Annotated[str, typer.Option(help="Kubernetes and Ray: an image with whet.")] = "whet:latest",
    accelerator: Annotated[str, typer.Option(help="SkyPilot: the kind of GPU.")] = "H100",
    json: Json = False,
) -> None:
    """Write a file that runs RECIPE [MACHINE] [KEY=VALUE ...] on a cluster, and say how to submit it."""
    import secrets

    from whet.files import writing
    from whet.launch.jobs import SUBMIT, job_of, render, template_of

    text = template_of(target)
    if write is None:
        raise ConfigError("--write FILE: missing; name the file to write")
    if template is not None:
        try:
            text = template.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--template {template}: cannot be read as text: {error}") from error
    if not eject:
        options = {"image": image, "accelerator": accelerator, "key": secrets.token_hex(32)}
        text = render(text, job_of(target, recipe, words or (), file=write.name, server_gpus=server_gpus, **options))
    with writing(write, len(text)):
        write.touch(mode=0o600)  # it may hold the key of the run
        write.write_text(text)
    submit = SUBMIT[target].format(file=write)
    if json:
        print_json({"file": str(write), "submit": None if eject else submit})
    else:
        print(one_line(f"{write}: written; {'--template uses it' if eject else f'submit it: {submit}'}"))
