"""`whet launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whet.cli.errors import one_line, print_json
from whet.cli.options import Json, Overrides, RecipeFile
from whet.errors import ConfigError

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
