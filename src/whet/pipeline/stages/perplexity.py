"""The perplexity stage: the held-out loss of several models on the same rows; `LABEL.json` has that of each row."""

from __future__ import annotations

import numpy as np

from whet.config import ModelConfig, SamplingConfig, TrainConfig
from whet.config.evaluation import PerplexityStage
from whet.evals.perplexity import RowLoss, loss_table
from whet.files import read_json, write_json
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.gate import gate
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Interrupted, Kind, Seen
from whet.pipeline.stages.eval import check_labels
from whet.training.tokenize import Gated

CHUNK_ROWS = 512


def run_perplexity(context: Context[PerplexityStage]) -> None:
    """Read every row with every model, and write `perplexity.json`."""
    check_labels(context.models)
    losses = {label: _losses(context, label, model) for label, model in context.models.items()}
    baseline = context.config.baseline
    write_json(context.folder / "perplexity.json", loss_table(losses, baseline if baseline in losses else None))


def _losses(context: Context[PerplexityStage], label: str, model: ModelConfig) -> list[RowLoss]:
    """The rows of one model; from its file if an earlier run got that far."""
    done = context.folder / f"{label}.json"
    found: list[RowLoss] = read_json(done)["rows"] if done.exists() else []
    if found:
        return found
    gated = _gated(context, model)
    keep_dropped(context, label, gated.kept.dropped)
    context.console.say(f"{context.name}: {label}: {gated.describe()}")
    trainer = context.world.policy(model, TrainConfig(), SamplingConfig()).trainer
    for start in range(0, len(gated.rows), CHUNK_ROWS):
        if context.stopped():
            raise Interrupted
        read = trainer.forward(gated.rows[start : start + CHUNK_ROWS], "logp")["logp"]
        found += [(-float(logp_T.sum(dtype=np.float64)), len(logp_T)) for logp_T in read]
    write_json(done, {"rows": found})
    return found


def _gated(context: Context[PerplexityStage], model: ModelConfig) -> Gated:
    config = context.config
    return gate(context.world, model, TrainConfig(loss_on=config.loss_on, max_length=config.max_length), config.data)


def check_perplexity(context: Context[PerplexityStage]) -> Seen:
    """Its rows, as the first model reads them."""
    gated = _gated(context, context.model)
    return Seen(summary=gated.describe(), rows=gated.rows[:SHOWN])


KIND = Kind(config=PerplexityStage, run=run_perplexity, check=check_perplexity)
