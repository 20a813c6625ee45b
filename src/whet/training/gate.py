"""The data gate: every training row is tokenized and checked before any weight is loaded, and closed by default.

What passes has a trained token, ends its trained turns with a trained stop token, is not longer than allowed and is
never cut. What does not pass is an error with file, line and remedy, or is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from whet.data.base import Conversation, Origin
from whet.data.faults import BadRow, Dropped, Rejects
from whet.errors import DataError
from whet.records import TokenRow, token_ids
from whet.templates.base import LossOn, Rendered, Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What went through the gate. Lengths are in tokens, percentiles by nearest rank."""

    rows: int
    tokens: int
    trained_tokens: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    duplicates: int
    """Rows whose tokens another row before them has; nothing is done about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """Rows that may be trained on, without columns, and what became of the others."""

    rows: tuple[TokenRow, ...]
    origins: tuple[Origin, ...]
    """Where each row came from."""
    dropped: Dropped
    stats: Stats

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.origins), "one origin per row"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row's text that is trained as a whole, or not at all."""

    text: str
    trained: bool


def tokenise(
    conversations: Sequence[Conversation],
    template: Template,
    *,
    loss_on: LossOn,
    max_length: int,
    on_bad_row: Literal["error", "drop"],
) -> Gated:
    """All conversations as rows of at most `max_length` tokens, in order.

    `on_bad_row="error"`: raises `BadRow` (a `DataError`) for the first row that cannot be trained on; `"drop"`:
    leaves such rows out and counts them. Raises `DataError` where no row is left.
    """
    rejects = Rejects(on_bad_row)
    rows: list[TokenRow] = []
    origins: list[Origin] = []
    for conversation in conversations:
        try:
            row = render_row(conversation, template, loss_on=loss_on, max_length=max_length)
        except BadRow as bad:
            rejects.add(bad)
            continue
        rows.append(row)
        origins.append(conversation.origin)
    if not rows:
        dropped = rejects.dropped
        raise DataError(f"nothing to train on; {dropped.describe() if dropped.total else 'the data set has no rows'}")
    return Gated(rows=tuple(rows), origins=tuple(origins), dropped=rejects.dropped, stats=_stats(rows))


def render_row(
    conversation: Conversation, template: Template, *, loss_on: LossOn, max_length: int, field: str = "messages"
) -> TokenRow:
    """One conversation as a row, or `BadRow` saying why it cannot be trained on; `field` is where it stood."""
    origin = conversation.origin
    _refuse_empty_answers(conversation)
    try:
        if conversation.text is None:
            rendered = template.conversation(
                conversation.messages, conversation.tools, loss_on=loss_on, settings=conversation.settings
            )
        else:
            rendered = template.text(conversation.text)
    except DataError as error:  # the template knows what is wrong, we know where
        what, _, remedy = str(error).partition("; ")
        raise BadRow(origin, "", what, remedy) from error
    if not any(rendered.trained):
        raise BadRow(origin, field, "no trained token", f"loss_on: {loss_on} needs an assistant message not marked out")
    if len(rendered.tokens) > max_length:
        cut, answer = sum(rendered.trained[max_length:]), sum(rendered.trained)
        raise BadRow(
            origin,
            field if conversation.text is None else "text",
            f"longer than max_length {max_length}",
            f"it has {len(rendered.tokens)} tokens, and {cut} of {answer} trained ones would be cut off; "
            "raise train.max_length, or set data.on_bad_row: drop",
        )
    _refuse_unended(rendered, template, origin)
    return TokenRow(tokens=token_ids(rendered.tokens), trained=np.array(rendered.trained))


def segments(row: TokenRow, template: Template) -> tuple[Segment, ...]:
    """The row's text, cut where training starts and stops, special tokens included."""
    runs = groupby(zip(row.tokens.tolist(), row.trained.tolist(), strict=True), key=lambda pair: pair[1])
    return tuple(Segment(template.decode([token for token, _ in run]), trained) for trained, run in runs)


def plain(parts: Sequence[Segment]) -> str:
    """Segments as text with the trained ones in «»; control characters are escaped, line ends kept."""
    return "".join(f"«{_escaped(part.text)}»" if part.trained else _escaped(part.text) for part in parts)


# ----------------------------------------------------------------------------------------------- checks


def _refuse_empty_answers(conversation: Conversation) -> None:
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            raise BadRow(
                conversation.origin, f"messages[{index}].content", "the assistant message is empty", "leave the row out"
            )


def _refuse_unended(rendered: Rendered, template: Template, origin: Origin) -> None:
    """Every trained stretch ends a turn, so a stop token must be in it, or the model never learns to stop."""
    pairs = zip(rendered.tokens, rendered.trained, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        if trained and template.stop_ids.isdisjoint(token for token, _ in run):
            raise BadRow(
                origin,
                "messages",
                "a trained turn without a trained stop token",
                "see how the chat template ends a turn",
            )


def _stats(rows: Sequence[TokenRow]) -> Stats:
    lengths = sorted(len(row.tokens) for row in rows)
    p50, p90, p99 = (lengths[-(-len(lengths) * percent // 100) - 1] for percent in (50, 90, 99))
    return Stats(
        rows=len(rows),
        tokens=sum(lengths),
        trained_tokens=sum(row.trained_count for row in rows),
        length_p50=p50,
        length_p90=p90,
        length_p99=p99,
        length_max=lengths[-1],
        duplicates=len(rows) - len({row.tokens.tobytes() for row in rows}),
    )


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
