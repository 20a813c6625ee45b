"""The SFT stage: data gate, training, evaluation loss, model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from whet.algorithms.sft import Imitate, sft, weigh
from whet.algorithms.supervised import supervised_steps
from whet.config import GeneratedConfig, ModelConfig, RLStage, SamplingConfig, SFTStage, Source
from whet.config.data import listed, weights
from whet.data.mixture import Blend, end_to_end
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
    data = gate_sets(context.world, context.model, config)
    context.console.say(f"{context.name}: {data.describe(context.seed)}")
    keep_dropped(context, "data", [dropped for each in data.sets.values() for dropped in each.kept.dropped])
    held_out: Sequence[TokenRow] = ()
    if config.eval_data is not None:
        evaluation = gate(context.world, context.model, config, config.eval_data)
        keep_dropped(context, "eval_data", evaluation.kept.dropped)
        held_out = evaluation.rows
    policy = context.world.policy(context.model, config.train, SamplingConfig())
    context.console.say(f"{context.name}: {policy.about}")
    rows = data.rows
    steps = supervised_steps(len(rows), config.train)
    train = partial(sft, policy.trainer, rows, config.train, seed=context.seed, blend=data.blend)

    def measure() -> Mapping[str, Metric]:
        return policy.trainer.evaluate(weigh(held_out), Imitate()) if held_out else {}

    def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
        return with_evaluation(train(start=start, state=state), measure, every=config.eval_every, last=steps)

    drive(context, policy.trainer, RunLog(context.folder), begin, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """The rows of all data sets of a stage that pass the gate."""

    sets: Mapping[str, Gated]
    """By their names."""
    blend: Blend

    @property
    def rows(self) -> Sequence[TokenRow]:
        """All sets end to end."""
        return end_to_end([each.rows for each in self.sets.values()])

    def describe(self, seed: int) -> str:
        """What each is, and their shares under the stage's seed where there are several."""
        parts = [each.describe() for each in self.sets.values()]
        if len(parts) == 1:
            return parts[0]
        lengths = [each.kept.lengths for each in self.sets.values()]
        named = [f"{name}: {part}" for name, part in zip(self.sets, parts, strict=True)]
        return "; ".join([*named, self.blend.describe(list(self.sets), lengths, seed)])


def gate_sets(world: World, model: ModelConfig, config: SFTStage) -> Sets:
    """The rows to train on, set by set."""
    sets: dict[str, Gated] = {}
    for source in listed(config.data):
        name = source.generate if isinstance(source, GeneratedConfig) else source.path
        sets[name if name not in sets else f"{name} ({len(sets) + 1})"] = gate(world, model, config, source)
    return Sets(sets=sets, blend=Blend(tuple(len(each.rows) for each in sets.values()), weights(config.data)))


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
