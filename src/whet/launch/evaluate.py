"""`whet eval`: a recipe's evaluation stage alone, on models that exist already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whet.config.loading import Loaded, load_recipe
from whet.errors import ConfigError
from whet.files import read_json
from whet.launch.main import asked_to_stop
from whet.launch.world import LocalWorld
from whet.models.device import pick_threads
from whet.pipeline.lineage import identity_name
from whet.pipeline.run import Run, claimed, context_of
from whet.pipeline.stage import TABLES, Interrupted
from whet.tracking.console import Console


def evaluate(loaded: Loaded, models: Mapping[str, str], *, quiet: bool = False) -> dict[str, Any]:
    """The table of the recipe's first stage that evaluates, for `models` (label: path) or the stage's own.

    What was evaluated is kept in `RUN/evaluations/`; asking again for the same, unchanged models shows it again.
    """
    recipe = loaded.recipe
    name = next((name for name, stage in recipe.stages.items() if stage.evaluates is not None), None)
    if name is None:
        raise ConfigError(f"{recipe.name}: the recipe has no stage of kind eval or perplexity; add one")
    run = Run(recipe=recipe, folder=recipe.folder)
    console = Console(quiet=quiet)
    torch.set_num_threads(pick_threads(recipe.threads))
    with claimed(run), asked_to_stop(console) as stopped:
        context = context_of(run, name, LocalWorld(folder=run.folder), console, stopped, models=models or None)
        folder = run.folder / "evaluations" / f"{name}-{identity_name(context, recipe.seed)}"
        try:
            run.kind(name).run(replace(context, folder=folder, checkpoints=folder))
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            console.close()
    return next(read_json(folder / name) for name in TABLES if (folder / name).is_file())


def load_held_out(data: Path, models: Mapping[str, str], overrides: Sequence[str]) -> Loaded:
    """A recipe that reads a file of rows (anything but YAML) with these models."""
    if not models:
        raise ConfigError(f"{data}: rows to read; name who is to read them, -m LABEL=RUN (or a model)")
    stage = {"kind": "perplexity", "data": data, "models": dict(models)}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"perplexity-{data.stem}")
    return load_recipe({"name": name, "model": next(iter(models.values())), "stages": {"perplexity": stage}}, overrides)
