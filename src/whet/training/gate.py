"""The data gate: every training row is checked before any weight is loaded, and the gate is closed by default.

What passes has a trained token, ends its trained turns with a trained stop token, is not longer than allowed and is
never cut. What does not pass is a `BadRow` with file, line and remedy; `training.tokenize` raises or keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from whet.data.base import Conversation, Origin
from whet.data.faults import BadRow
from whet.errors import DataError
from whet.records import TokenRow
from whet.templates.base import Encoded, LossOn, Script, Template, TooLong


class Window(int):
    """A longest row that the model itself sets: no `train.max_length` can raise it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """What a row must be."""

    template: Template
    max_length: int
    loss_on: LossOn = "assistant"
    on_bad_row: Literal["error", "drop"] = "error"

    @property
    def digest(self) -> str:
        """Changes when other rows pass, or pass as other tokens."""
        return f"{self.template.digest} {self.loss_on} {self.max_length} {self.on_bad_row}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row's text that is trained as a whole, or not at all."""

    text: str
    trained: bool


def write_row(conversation: Conversation, rule: RowRule) -> Script:
    """One conversation as text, or `BadRow` saying why it cannot be trained on."""
    _refuse_empty_answers(conversation)
    try:
        if conversation.text is not None:
            return rule.template.running(conversation.text)
        return rule.template.script(
            conversation.messages, conversation.tools, loss_on=rule.loss_on, settings=conversation.settings
        )
    except DataError as error:
        raise _placed(error, conversation.origin) from error


def check_row(encoded: Encoded | DataError, conversation: Conversation, field: str, rule: RowRule) -> Encoded:
    """Its tokens, or `BadRow` saying why it cannot be trained on; `field` is where it stood."""
    origin = conversation.origin
    field = field if conversation.text is None else "text"
    if isinstance(encoded, TooLong):
        raise _too_long(origin, field, rule, f"it has more than {2 * rule.max_length}") from encoded
    if isinstance(encoded, DataError):
        raise _placed(encoded, origin) from encoded
    tokens, trained = encoded.tokens, encoded.trained
    if not trained.any():
        needed = f"loss_on: {rule.loss_on} needs an assistant message not marked out"
        raise BadRow(origin, field, "no trained token", needed)
    if len(tokens) > rule.max_length:
        cut, answer = trained[rule.max_length :].sum(), trained.sum()
        raise _too_long(
            origin, field, rule, f"it has {len(tokens)} tokens, and {cut} of {answer} trained ones would be cut off"
        )
    _refuse_unended(encoded, conversation, rule.template)
    return encoded


def token_row(encoded: Encoded, *, shared: int = 0) -> TokenRow:
    """Tokens as a row without columns."""
    return TokenRow(tokens=encoded.tokens, trained=encoded.trained, shared=shared)


def segments(row: TokenRow, template: Template) -> tuple[Segment, ...]:
    """The row's text, cut where training starts and stops, special tokens included."""
    runs = groupby(zip(row.tokens.tolist(), row.trained.tolist(), strict=True), key=lambda pair: pair[1])
    return tuple(Segment(template.decode([token for token, _ in run]), trained) for trained, run in runs)


# ----------------------------------------------------------------------------------------------- checks


def _placed(error: DataError, origin: Origin) -> BadRow:
    """The template knows what is wrong, we know where."""
    what, _, remedy = str(error).partition("; ")
    return BadRow(origin, "", what, remedy)


def _too_long(origin: Origin, field: str, rule: RowRule, tokens: str) -> BadRow:
    own = isinstance(rule.max_length, Window)
    what = f"longer than {f'the model attends to, {rule.max_length}' if own else f'max_length {rule.max_length}'}"
    return BadRow(origin, field, what, f"{tokens}; {'shorten it' if own else 'raise train.max_length'}", droppable=True)


def _refuse_empty_answers(conversation: Conversation) -> None:
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            raise BadRow(
                conversation.origin, f"messages[{index}].content", "the assistant message is empty", "leave the row out"
            )


def _refuse_unended(encoded: Encoded, conversation: Conversation, template: Template) -> None:
    """Every trained stretch ends a turn, so a stop token must be in it, or the model never learns to stop.

    Where calls are inline, a turn may end with the tag that closes one.
    """
    edges = (np.flatnonzero(encoded.trained[1:] != encoded.trained[:-1]) + 1).tolist()  # the first is never trained
    starts, ends = edges[::2], [*edges[1::2], len(encoded.trained)]
    stops = np.zeros(len(encoded.tokens), np.bool_)
    for stop in template.stop_ids:  # a few: faster than np.isin
        stops |= encoded.tokens == stop
    ended = np.logical_or.reduceat(stops & encoded.trained, starts)
    for start, end, sound in zip(starts, ends, ended, strict=False):
        if not sound and not template.decode(encoded.tokens[start:end].tolist()).endswith(
            template.stops(conversation.tools)
        ):
            how = "see how the chat template ends a turn"
            raise BadRow(conversation.origin, "messages", "a trained turn without a trained stop token", how)
