"""The SFT stage: data gate, training, evaluation loss, model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from whet.algorithms.sft import Imitate, sft, weigh
from whet.algorithms.supervised import supervised_steps
from whet.config import ModelConfig, SamplingConfig, SFTStage
from whet.pipeline.gate import gate
from whet.pipeline.loop import drive, with_evaluation
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Kind, Seen, World
from whet.records import Metric, Step
from whet.tracking.catalogue import IMITATION, TRAINING
from whet.tracking.charts import Look
from whet.tracking.log import RunLog
from whet.tracking.text import number


def run_sft(context: Context[SFTStage]) -> None:
    """Train on the rows that pass the gate."""
    config = context.config
    data = gate(context.world, context.model, config.train, config.data)
    context.console.say(f"{context.name}: {data.describe()}")
    held_out = gate(context.world, context.model, config.train, config.eval_data).gated.rows if config.eval_data else ()
    policy = context.world.policy(context.model, config.train, SamplingConfig())
    context.console.say(f"{context.name}: {policy.about}")
    rows = data.gated.rows
    steps = supervised_steps(len(rows), config.train)

    def measure() -> Mapping[str, Metric]:
        return policy.trainer.evaluate(weigh(held_out), Imitate()) if held_out else {}

    def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
        steps_of = sft(policy.trainer, rows, config.train, seed=context.seed, start=start, state=state)
        return with_evaluation(steps_of, measure, every=config.eval_every, last=steps)

    drive(context, policy.trainer, RunLog(context.folder), begin, steps=steps)


def check_sft(config: SFTStage, model: ModelConfig, world: World) -> Seen:
    """Both sets of rows through the gate."""
    data = gate(world, model, config.train, config.data)
    summary = data.describe()
    if config.eval_data is not None:
        summary += f"; for evaluation {gate(world, model, config.train, config.eval_data).describe()}"
    return Seen(summary=summary, rows=data.gated.rows[:SHOWN])


KIND = Kind(
    config=SFTStage,
    run=run_sft,
    check=check_sft,
    look=Look(charts=(*IMITATION, *TRAINING), headline=(("loss", "loss", number),)),
)
