"""The SFT stage: data gate, training, evaluation loss, model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from whet.algorithms.sft import CrossEntropy, sft, weigh
from whet.algorithms.supervised import supervised_steps
from whet.config import SFTStage
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.gate import gate, gate_sets
from whet.pipeline.held_out import of_rows, of_tasks, sampling_of
from whet.pipeline.playing import SHOWN, evaluation_summary
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Seen
from whet.records import Step, TokenRow
from whet.tracking.catalogue import HELD_OUT_TASKS, IMITATION, TRAINING
from whet.tracking.charts import Look
from whet.tracking.log import RunLog
from whet.tracking.text import number


def run_sft(context: Context[SFTStage]) -> None:
    """Train on the rows that pass the gate."""
    config = context.config
    data = gate_sets(context.world, context.model, config.train, config.data, context.console.say)
    context.console.say(f"{context.name}: {data.describe(context.seed)}")
    keep_dropped(context, "data", [dropped for each in data.sets.values() for dropped in each.kept.dropped])
    held_out: Sequence[TokenRow] = ()
    if config.eval_data is not None:
        evaluation = gate(context.world, context.model, config.train, config.eval_data)
        keep_dropped(context, "eval_data", evaluation.kept.dropped)
        held_out = evaluation.rows
    with of_tasks(context) as measuring:
        policy = context.world.policy(context.model, config.train, sampling_of(config.evaluation))
        context.console.say(f"{context.name}: {policy.about}")
        rows = data.rows
        steps = supervised_steps(len(rows), config.train)
        train = partial(sft, policy.trainer, rows, config.train, seed=context.seed, blend=data.blend)
        loss = of_rows(lambda: policy.trainer.evaluate(weigh(held_out), CrossEntropy()))
        measures = [*([loss] if held_out else []), *measuring(policy)]

        def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
            return train(start=start, state=state)

        drive(context, policy.trainer, RunLog(context.folder), begin, steps=steps, measures=measures)


def check_sft(context: Context[SFTStage]) -> Seen:
    """All sets of rows through the gate."""
    config, world, model = context.config, context.world, context.model
    data = gate_sets(world, model, config.train, config.data)
    summary = data.describe(context.seed)
    if config.eval_data is not None:
        summary += f"; for evaluation {gate(world, model, config.train, config.eval_data).describe()}"
    summary = "; ".join([summary, *evaluation_summary(context)])
    return Seen(summary=summary, rows=data.rows[:SHOWN])


KIND = Kind(
    config=SFTStage,
    run=run_sft,
    check=check_sft,
    look=Look(charts=(*IMITATION, *TRAINING), headline=(HELD_OUT_TASKS, ("loss", "loss", number))),
)
