"""What stages share that imitate: conversations through the data gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from whet.algorithms.supervised import largest_step
from whet.config import DistillStage, GeneratedConfig, ModelConfig, SFTStage, Source, Sources, TrainConfig
from whet.config.data import listed, weights
from whet.data.mixture import Blend, end_to_end
from whet.pipeline.load_data import conversations
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Seen, World, keep_dropped
from whet.records import TokenRow
from whet.training.gate import Window
from whet.training.tokenize import Gated, Say, tokenise


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


def rows_to_imitate(context: Context[SFTStage] | Context[DistillStage]) -> tuple[Sets, Sequence[TokenRow]]:
    """The rows of `data`, and those of `eval_data`, with what became of the others told and noted."""
    config = context.config
    assert config.data is not None, "a stage that imitates has rows"
    data = gate_sets(context.world, context.model, config.train, config.data, context.console.say)
    context.console.say(f"{context.name}: {data.describe(context.seed)}")
    keep_dropped(context, "data", [dropped for each in data.sets.values() for dropped in each.kept.dropped])
    if config.eval_data is None:
        return data, ()
    evaluation = gate(context.world, context.model, config.train, config.eval_data)
    keep_dropped(context, "eval_data", evaluation.kept.dropped)
    return data, evaluation.rows


def look_at_rows(context: Context[SFTStage] | Context[DistillStage]) -> Seen:
    """All sets of rows through the gate."""
    config, world, model = context.config, context.world, context.model
    assert config.data is not None, "a stage that imitates has rows"
    data = gate_sets(world, model, config.train, config.data)
    summary = data.describe(context.seed)
    if config.eval_data is not None:
        summary += f"; for evaluation {gate(world, model, config.train, config.eval_data).describe()}"
    lengths = np.concatenate([each.kept.lengths for each in data.sets.values()]).tolist()
    largest = largest_step(lengths, config.train, context.seed, data.blend)
    return Seen(summary=summary, rows=data.rows[:SHOWN], step_tokens=largest, uncut_tokens=max(lengths))


def gate_sets(world: World, model: ModelConfig, train: TrainConfig, data: Sources, say: Say | None = None) -> Sets:
    """The rows to train on, set by set; `say` gets the progress, where it takes long."""
    sets: dict[str, Gated] = {}
    for source in listed(data):
        name = source.generate if isinstance(source, GeneratedConfig) else source.path
        sets[name if name not in sets else f"{name} ({len(sets) + 1})"] = gate(world, model, train, source, say)
    return Sets(sets=sets, blend=Blend(tuple(len(each.rows) for each in sets.values()), weights(data)))


def row_limit(world: World, model: ModelConfig, train: TrainConfig) -> int:
    """Tokens of the longest row: the recipe's, or the model's own where that is less."""
    window = world.max_length(model)
    return Window(window) if train.max_length is None or train.max_length >= window else train.max_length


def gate(world: World, model: ModelConfig, train: TrainConfig, source: Source, say: Say | None = None) -> Gated:
    """Rows, tokenised and checked; nothing but the tokenizer is loaded for it."""
    longest = row_limit(world, model, train)
    return tokenise(
        conversations(source),
        world.template(model),
        loss_on=train.loss_on,
        max_length=longest,
        on_bad_row=source.on_bad_row,
        say=say,
    )
