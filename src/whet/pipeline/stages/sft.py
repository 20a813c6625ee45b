"""The SFT stage: data gate, training, evaluation loss, model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from whet.algorithms.sft import CrossEntropy, sft, weigh
from whet.algorithms.supervised import supervised_steps
from whet.config import SFTStage
from whet.pipeline.gate import look_at_rows, rows_to_imitate
from whet.pipeline.held_out import of_rows, of_tasks, sampling_of
from whet.pipeline.playing import evaluation_summary
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Seen
from whet.tracking.charts import HELD_OUT_TASKS, IMITATION, TRAINING, Look
from whet.tracking.log import RunLog
from whet.tracking.text import number


def run_sft(context: Context[SFTStage]) -> None:
    """Train on the rows that pass the gate."""
    config = context.config
    data, held_out = rows_to_imitate(context)
    with of_tasks(context) as measuring:
        policy = context.world.policy(context.model, config.train, sampling_of(config.evaluation))
        context.console.say(f"{context.name}: {policy.about}")
        rows = data.rows
        steps = supervised_steps(len(rows), config.train)
        begin = partial(sft, policy.trainer, rows, config.train, seed=context.seed, blend=data.blend)
        loss = of_rows(lambda: policy.trainer.evaluate(weigh(held_out), CrossEntropy()))
        measures = [*([loss] if held_out else []), *measuring(policy)]
        drive(context, policy.trainer, RunLog(context.folder), begin, steps=steps, measures=measures)


def check_sft(context: Context[SFTStage]) -> Seen:
    """All sets of rows through the gate."""
    seen = look_at_rows(context)
    return replace(seen, summary="; ".join([seen.summary, *evaluation_summary(context)]))


KIND = Kind(
    config=SFTStage,
    run=run_sft,
    check=check_sft,
    look=Look(charts=(*IMITATION, *TRAINING), headline=(HELD_OUT_TASKS, ("loss", "loss", number))),
)
