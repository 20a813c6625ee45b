"""What stages share that imitate: conversations through the data gate."""

from __future__ import annotations

from dataclasses import dataclass

from whet.config import GeneratedConfig, ModelConfig, Source, TrainConfig
from whet.data.faults import Dropped
from whet.pipeline.sources import conversations
from whet.pipeline.stage import World
from whet.training.gate import Gated, tokenise


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the two doors of the gate let through: reading the rows, and tokenizing them."""

    gated: Gated
    unread: Dropped

    def describe(self) -> str:
        """`4096 rows, 61,234 tokens (38,400 trained), longest 41; 2 rows dropped: ...`."""
        stats = self.gated.stats
        lost = [dropped.describe() for dropped in (self.unread, self.gated.dropped) if dropped.total]
        counted = f"{stats.rows:,} rows, {stats.tokens:,} tokens ({stats.trained_tokens:,} trained)"
        return "; ".join([f"{counted}, longest {stats.length_max:,}", *lost])


def gate(world: World, model: ModelConfig, train: TrainConfig, source: Source) -> Checked:
    """Rows, tokenised and checked; nothing but the tokenizer is loaded for it."""
    limit = world.max_length(model)
    examples, unread = conversations(source)
    gated = tokenise(
        examples,
        world.template(model),
        loss_on=train.loss_on,
        max_length=min(train.max_length or limit, limit),
        on_bad_row="error" if isinstance(source, GeneratedConfig) else source.on_bad_row,
    )
    return Checked(gated=gated, unread=unread)
