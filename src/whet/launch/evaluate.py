"""`whet eval`: a recipe's evaluation alone, on models that exist already; or the held-out loss of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whet.config import SamplingConfig, SFTStage, TrainConfig
from whet.config.loading import Loaded, load_recipe
from whet.errors import ConfigError
from whet.evals.run import loss_table
from whet.files import is_sealed, read_json, write_json
from whet.launch.main import asked_to_stop
from whet.launch.world import LocalWorld
from whet.models.device import pick_threads
from whet.pipeline.gate import gate
from whet.pipeline.lineage import identity_name
from whet.pipeline.reference import CHUNK_ROWS
from whet.pipeline.run import Run, claimed, context_of
from whet.pipeline.stage import Context, Interrupted
from whet.tracking.console import Console


def evaluate(loaded: Loaded, models: Mapping[str, str], *, quiet: bool = False) -> dict[str, Any]:
    """The evaluation table of the recipe's first eval stage, for `models` (label: path) or the stage's own.

    What was evaluated is kept in `RUN/evaluations/`; asking again for the same, unchanged models shows it again.
    Where there is no such stage it is the held-out loss on the `eval_data` of the first SFT stage that has some, which
    is kept likewise.
    """
    recipe = loaded.recipe
    names = [name for name, stage in recipe.stages.items() if stage.evaluates is not None]
    names += [name for name, stage in recipe.stages.items() if isinstance(stage, SFTStage) and stage.eval_data]
    if not names:
        raise ConfigError(f"{recipe.name}: the recipe has no stage of kind eval, and no SFT with eval_data; add one")
    name = names[0]
    run = Run(recipe=recipe, folder=recipe.folder)
    console = Console(quiet=quiet)
    torch.set_num_threads(pick_threads(recipe.threads))
    with claimed(run), asked_to_stop(console) as stopped, closing(console):
        context = context_of(run, name, LocalWorld(folder=run.folder), console, stopped, models=models or None)
        folder = run.folder / "evaluations" / f"{name}-{identity_name(context, recipe.seed)}"
        try:
            if isinstance(context.config, SFTStage):
                if not (folder / "loss.json").is_file():
                    write_json(folder / "loss.json", _held_out_loss(context, models))
                return read_json(folder / "loss.json")
            run.kind(name).run(replace(context, folder=folder, checkpoints=folder))
        except Interrupted:
            raise KeyboardInterrupt from None
    return read_json(folder / "eval.json")


def load_rows(data: Path, models: Mapping[str, str], overrides: Sequence[str]) -> Loaded:
    """A recipe whose `eval_data` is this file of rows."""
    if (data / "recipe.json").exists():
        raise ConfigError(f"{data}: is a run; give a recipe or a file of rows, and the run as a model: -m LABEL={data}")
    if not models:
        raise ConfigError(f"{data}: these are rows; say which models read them: -m LABEL=RUN, or any other model")
    stage = {"kind": "sft", "data": data, "eval_data": data}
    return load_recipe({"name": "eval", "model": next(iter(models.values())), "stages": {"eval": stage}}, overrides)


def _held_out_loss(context: Context[SFTStage], models: Mapping[str, str]) -> dict[str, Any]:
    config, losses = context.config, {}
    assert config.eval_data is not None
    made = {context.name: str(context.folder / "model")} if is_sealed(context.folder) else {}
    for label, path in (models or {"start": context.model.path, **made}).items():
        model = context.model.at(path)
        gated = gate(context.world, model, config.train, config.eval_data, context.console.say)
        context.console.say(f"{label}: {gated.describe()}")
        trainer, read = context.world.policy(model, TrainConfig(), SamplingConfig()).trainer, []
        for start in range(0, len(gated.rows), CHUNK_ROWS):
            if context.stopped():
                raise Interrupted
            read += trainer.forward(gated.rows[start : start + CHUNK_ROWS], "logp")["logp"]
        nats, checksums = (-float(logp_T.sum(dtype=np.float64)) for logp_T in read), gated.kept.columns["checksum"]
        losses[label] = list(zip(nats, map(len, read), checksums.tolist(), strict=True))
    return loss_table(losses)
