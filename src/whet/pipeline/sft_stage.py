"""The SFT stage: data gate, training, evaluation loss, model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from whet.algorithms.sft import Imitate, sft, weigh
from whet.algorithms.supervised import supervised_steps
from whet.config import GeneratedConfig, ModelConfig, RLStage, SamplingConfig, SFTStage, Source
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.loop import drive
from whet.pipeline.sources import conversations
from whet.pipeline.stage import Context, World
from whet.records import Metric, Step, TokenRow
from whet.tracking.log import RunLog
from whet.training.tokenize import Gated, tokenise


def run_sft(context: Context) -> None:
    """Train on the rows that pass the gate."""
    config = context.config
    assert isinstance(config, SFTStage)
    data = gate(context.world, context.model, config, config.data)
    context.console.say(f"{context.name}: {data.describe()}")
    keep_dropped(context, "data", data.kept.dropped)
    held_out: Sequence[TokenRow] = ()
    if config.eval_data is not None:
        evaluation = gate(context.world, context.model, config, config.eval_data)
        keep_dropped(context, "eval_data", evaluation.kept.dropped)
        held_out = evaluation.rows
    policy = context.world.policy(context.model, config.train, SamplingConfig())
    context.console.say(f"{context.name}: {policy.about}")
    rows = data.rows
    steps = supervised_steps(len(rows), config.train)

    def measure() -> Mapping[str, Metric]:
        return policy.trainer.evaluate(weigh(held_out), Imitate()) if held_out else {}

    def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
        steps_of = sft(policy.trainer, rows, config.train, seed=context.seed, start=start, state=state)
        return with_evaluation(steps_of, measure, every=config.eval_every, last=steps)

    drive(context, policy.trainer, RunLog(context.folder), begin, steps=steps)


def gate(world: World, model: ModelConfig, config: SFTStage | RLStage, source: Source) -> Gated:
    """Rows, tokenised and checked; nothing but the tokenizer is loaded for it."""
    limit = world.max_length(model)
    return tokenise(
        conversations(source),
        world.template(model),
        loss_on=config.train.loss_on,
        max_length=min(config.train.max_length or limit, limit),
        on_bad_row="error" if isinstance(source, GeneratedConfig) else source.on_bad_row,
    )


def with_evaluation(
    steps: Iterator[Step], measure: Callable[[], Mapping[str, Metric]], *, every: int, last: int
) -> Iterator[Step]:
    """The same steps, with what is measured on held-out rows (`eval_loss` ...) every so often and at the last one."""
    for step in steps:
        if step.index % every == 0 or step.index == last:
            held_out = {f"eval_{name}": metric.mean for name, metric in measure().items()}
            step = replace(step, metrics={**step.metrics, **held_out})
        yield step
