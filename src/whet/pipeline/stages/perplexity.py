"""The perplexity stage: the held-out loss of several models on the same rows. What each row costs is in `LABEL.json`."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from whet.config import ModelConfig, SamplingConfig, TrainConfig
from whet.config.evaluation import PerplexityStage
from whet.evals.perplexity import RowLoss, table
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
    write_json(context.folder / "perplexity.json", table(losses, baseline if baseline in losses else None))


def _losses(context: Context[PerplexityStage], label: str, model: ModelConfig) -> list[RowLoss]:
    """The rows of one model; from its file if an earlier run got that far."""
    done = context.folder / f"{label}.json"
    if done.exists():
        return [RowLoss(**row) for row in read_json(done)["rows"]]
    gated = _gated(context, model)
    keep_dropped(context, label, gated.kept.dropped)
    context.console.say(f"{context.name}: {label}: {gated.describe()}")
    trainer = context.world.policy(model, TrainConfig(), SamplingConfig()).trainer
    starts = range(0, len(gated.rows), CHUNK_ROWS)
    context.console.begin(f"{context.name} {label}", len(starts))
    found: list[RowLoss] = []
    for number, start in enumerate(starts, start=1):
        if context.stopped():
            raise Interrupted
        read = trainer.forward(gated.rows[start : start + CHUNK_ROWS], "logp")["logp"]
        found += [RowLoss(nll=-float(logp_T.sum(dtype=np.float64)), tokens=len(logp_T)) for logp_T in read]
        loss = sum(row.nll for row in found) / sum(row.tokens for row in found)
        context.console.log(context.name, number, {"eval_loss": loss}, ())
    context.console.close()
    write_json(done, {"rows": [asdict(row) for row in found]})
    return found


def _gated(context: Context[PerplexityStage], model: ModelConfig) -> Gated:
    config = context.config
    return gate(context.world, model, TrainConfig(loss_on=config.loss_on, max_length=config.max_length), config.data)


def check_perplexity(context: Context[PerplexityStage]) -> Seen:
    """Its rows, as the first model reads them."""
    gated = _gated(context, context.model)
    return Seen(summary=gated.describe(), rows=gated.rows[:SHOWN])


KIND = Kind(config=PerplexityStage, run=run_perplexity, check=check_perplexity)
