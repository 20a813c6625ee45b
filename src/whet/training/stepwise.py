"""Answers that are read at some of their tokens: at the ends of steps, or at their own end.

A score stands at the token that completes a piece of the answer (`templates.places`); for the end of the answer that
is its stop token. Training rows and rows to be scored are made by one function, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from whet.data.base import Origin, Stepwise
from whet.data.faults import BadRow, Dropped, Rejects
from whet.errors import DataError
from whet.records import Message, TokenRow, token_ids
from whet.templates.base import NO_SETTINGS, Settings, Template
from whet.templates.places import completing_tokens
from whet.training.gate import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedRow:
    """An answer cut into steps, as tokens."""

    origin: Origin
    row: TokenRow
    """Trained at the end of each step that has a label; the prompt is what it has to share."""
    labels: tuple[float, ...]


def read_at(
    messages: Sequence[Message], ends: Sequence[int], template: Template, *, max_length: int, of: Settings = NO_SETTINGS
) -> TokenRow:
    """A conversation that is read at `ends` (characters of its last message, ascending), up to the last of them.

    `of`: the row's variables of the template. Raises `DataError` where that does not write the answer as it is, two
    ends fall into one token, or the row is longer than `max_length` tokens.
    """
    rendered = template.conversation(messages, loss_on="completion", settings=of)
    first, answer = rendered.trained.index(True), messages[-1].content
    last = max(place for place, trained in enumerate(rendered.trained) if trained)
    tokens = rendered.tokens[first : last + 1]
    if answer not in template.decode(tokens):
        raise DataError("the chat template changes the answer's text; a reward model must see what was written")
    places = [first + place for place in completing_tokens(tokens, answer, ends, template.decode)]
    if len(set(places)) < len(places):
        raise DataError("two steps end in the same token; leave no step empty, or cut the answer elsewhere")
    length = places[-1] + 1
    if length > max_length:
        own = isinstance(max_length, Window)
        limit = f"the model attends to, {max_length}" if own else f"max_length {max_length}"
        raise DataError(f"longer than {limit}; it has {length} tokens{'' if own else '; raise train.max_length'}")
    trained = np.isin(np.arange(length), places)
    return TokenRow(tokens=token_ids(rendered.tokens[:length]), trained=trained, shared=first)


def tokenise_stepwise(
    examples: Sequence[Stepwise], template: Template, *, max_length: int, on_bad_row: Literal["error", "drop"]
) -> tuple[list[SteppedRow], Dropped]:
    """All examples as rows, in order, and what was left out.

    `on_bad_row="error"`: raises `BadRow` for the first example that cannot be trained on; `"drop"`: counts them.
    Raises `DataError` where none is left.
    """
    rejects, passed = Rejects(on_bad_row), list[SteppedRow]()
    for example in examples:
        messages = (*example.prompt, Message(role="assistant", content="".join(example.steps)))
        lengths = accumulate(len(step) for step in example.steps)
        graded = [(end, label) for end, label in zip(lengths, example.labels, strict=False) if label is not None]
        try:
            ends = [end for end, _ in graded]
            row = read_at(messages, ends, template, max_length=max_length, of=example.settings)
        except DataError as error:
            what, _, remedy = str(error).partition("; ")
            rejects.add(BadRow(example.origin, "steps", what, remedy))
            continue
        passed.append(SteppedRow(origin=example.origin, row=row, labels=tuple(label for _, label in graded)))
    if not passed:
        raise DataError(f"nothing to train on; {rejects.dropped.describe()}")
    return passed, rejects.dropped
