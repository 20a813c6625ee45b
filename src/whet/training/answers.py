"""Answers to given prompts through the data gate: compared, judged, rated, or graded step by step.

Answers to one prompt become rows that share its tokens. The gate of `training.gate` holds for every answer: it has a
trained stop token, is not longer than allowed and is never cut. Here it is checked as well that the prompt is tokenised
the same under all of them, since it is computed once.

A score stands at the token that completes a piece of the answer (`templates.places`); for the end of the answer that is
its stop token. Training rows and rows to be scored are made by one function, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from statistics import fmean
from typing import Generic, Literal, TypeVar

import numpy as np

from whet.data.base import Comparison, Conversation, Judged, Rated, Stepwise
from whet.data.faults import BadRow, Dropped, Rejects
from whet.errors import DataError
from whet.records import Atom, Flags, Message, TokenRow, token_ids
from whet.templates.base import NO_SETTINGS, Settings, Template
from whet.templates.places import completing_tokens
from whet.training.gate import RowRule, Window, check_row, token_row, write_row

Example = TypeVar("Example", Comparison, Judged, Rated, Stepwise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenised(Generic[Example]):
    """An example of a data set and its answers as tokens."""

    source: Example
    atom: Atom
    """One row for each answer, the best first, which share the prompt. Every token of an answer is trained; of one in
    steps those that end a step with a label."""


def tokenise_answers(
    examples: Sequence[Example], template: Template, *, max_length: int, on_bad_row: Literal["error", "drop"]
) -> tuple[list[Tokenised[Example]], Dropped]:
    """All examples as atoms, in order, and what was left out.

    `on_bad_row="error"`: raises `BadRow` (a `DataError`) for the first example that cannot be trained on; `"drop"`:
    leaves such out and counts them. Raises `DataError` where none is left.
    """
    rejects, passed = Rejects(on_bad_row), list[Tokenised[Example]]()
    for each in examples:
        try:
            passed.append(Tokenised(source=each, atom=_atom(each, template, max_length)))
        except BadRow as bad:
            rejects.add(bad)
    if not passed:
        dropped = rejects.dropped
        raise DataError(f"nothing to train on; {dropped.describe() if dropped.total else 'the data set has no rows'}")
    return passed, rejects.dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceStats:
    """What went through the gate. Lengths are in tokens, stop token included."""

    rows: int
    """Comparisons, or judged answers."""
    answers: int
    tokens: int
    """Tokens that one pass over all of it computes, each prompt once."""
    trained_tokens: int
    length_max: int
    mean_better: float
    """Mean length of the better answers of all pairs, or of the good ones."""
    mean_worse: float
    longer_wins: float
    """Share of the pairs in which the better answer is the longer one, half for equals; NaN for judged answers.
    Far from one half, a loss may learn length instead of what was meant."""
    left_out: int = 0
    """Answers of lists that were as good as another one, or for judged answers neither the best nor the worst."""

    def describe(self) -> str:
        """`500 comparisons of 1,000 answers, ... tokens (... trained), longest 90; better answers have 31 ...`."""
        paired = self.longer_wins == self.longer_wins
        text = f"{self.rows:,} comparisons of {self.answers:,} answers" if paired else f"{self.rows:,} judged answers"
        text += f", {self.tokens:,} tokens ({self.trained_tokens:,} trained), longest {self.length_max:,}"
        means = (self.mean_better, self.mean_worse)
        for name, mean in zip(("better", "worse") if paired else ("good", "bad"), means, strict=True):
            text += f"; {name} answers have {mean:.0f} tokens" if mean == mean else f"; there are no {name} answers"
        if paired:
            text += f", the longer one is preferred in {self.longer_wins:.0%}"
        why = "tied" if paired else "middling"
        return text + (f"; {self.left_out:,} {why} answers left out" if self.left_out else "")


def compared_stats(passed: Sequence[Tokenised[Comparison]], given: Sequence[Comparison]) -> PreferenceStats:
    """Of the comparisons that passed, and of the answers that all that were given left out."""
    atoms = [each.atom for each in passed]
    pairs = [pair for atom in atoms for pair in combinations([row.trained_count for row in atom.rows], 2)]
    rows = [row for atom in atoms for row in atom.rows]
    return PreferenceStats(
        rows=len(passed),
        answers=len(rows),
        tokens=sum(atom.cost for atom in atoms),
        trained_tokens=sum(row.trained_count for row in rows),
        length_max=max(len(row.tokens) for row in rows),
        mean_better=fmean(better for better, _ in pairs),
        mean_worse=fmean(worse for _, worse in pairs),
        longer_wins=fmean((better > worse) + (better == worse) / 2 for better, worse in pairs),
        left_out=sum(comparison.tied for comparison in given),
    )


def judged_stats(passed: Sequence[Tokenised[Judged]], given: Sequence[Judged]) -> PreferenceStats:
    """The same of judged answers."""
    rows = [(each.atom.rows[0], each.source.good) for each in passed]
    lengths = {wanted: [row.trained_count for row, good in rows if good is wanted] for wanted in (True, False)}
    return PreferenceStats(
        rows=len(passed),
        answers=len(passed),
        tokens=sum(len(row.tokens) for row, _ in rows),
        trained_tokens=sum(row.trained_count for row, _ in rows),
        length_max=max(len(row.tokens) for row, _ in rows),
        mean_better=fmean(lengths[True]) if lengths[True] else float("nan"),
        mean_worse=fmean(lengths[False]) if lengths[False] else float("nan"),
        longer_wins=float("nan"),
        left_out=sum(each.left_out for each in given),
    )


def ends_only(atom: Atom) -> Atom:
    """The same rows up to the last token of each answer, which alone is trained: where a reward model's score is read.

    For an answer that ends a turn the token is its stop token; columns are left behind.
    """
    ends = [_last(row.trained) for row in atom.rows]
    return Atom(
        rows=tuple(
            replace(row, tokens=row.tokens[: end + 1], trained=np.arange(end + 1) == end, columns={})
            for row, end in zip(atom.rows, ends, strict=True)
        )
    )


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


# ----------------------------------------------------------------------------------------------- helpers


def _atom(each: Comparison | Judged | Rated | Stepwise, template: Template, max_length: int) -> Atom:
    if isinstance(each, Comparison):
        return _compared(each, template, max_length)
    if isinstance(each, Stepwise):
        return _graded(each, template, max_length)
    row = _answer_row(each, each.answer, template, max_length, "")
    return Atom(rows=(_sharing(row, _prompt_length(row)),))


def _graded(example: Stepwise, template: Template, max_length: int) -> Atom:
    messages = (*example.prompt, Message(role="assistant", content="".join(example.steps)))
    lengths = accumulate(len(step) for step in example.steps)
    ends = [end for end, label in zip(lengths, example.labels, strict=False) if label is not None]
    try:
        return Atom(rows=(read_at(messages, ends, template, max_length=max_length, of=example.settings),))
    except DataError as error:
        what, _, remedy = str(error).partition("; ")
        raise BadRow(example.origin, "steps", what, remedy) from error


def _compared(comparison: Comparison, template: Template, max_length: int) -> Atom:
    origin = comparison.origin
    rows = [
        _answer_row(comparison, answer, template, max_length, f"answers[{index}]")
        for index, answer in enumerate(comparison.answers)
    ]
    shared = _prompt_length(rows[0])
    for index, row in enumerate(rows):
        if _prompt_length(row) != shared or not np.array_equal(row.tokens[:shared], rows[0].tokens[:shared]):
            raise BadRow(
                origin,
                f"answers[{index}]",
                "the chat template writes the prompt differently before this answer than before the first",
                "answers of one row are compared after the same prompt; see model.chat_template",
            )
        if any(np.array_equal(row.tokens, other.tokens) for other in rows[:index]):
            raise BadRow(origin, f"answers[{index}]", "has the same tokens as another answer", "leave it out")
    return Atom(rows=tuple(_sharing(row, shared) for row in rows))


def _answer_row(
    each: Comparison | Judged | Rated, answer: tuple[Message, ...], template: Template, max_length: int, field: str
) -> TokenRow:
    whole = Conversation(origin=each.origin, messages=each.prompt + answer, tools=each.tools, settings=each.settings)
    rule = RowRule(template=template, max_length=max_length)
    (encoded,) = template.encode([write_row(whole, rule)], most=max_length)
    return token_row(check_row(encoded, whole, field, rule))


def _prompt_length(row: TokenRow) -> int:
    return int(row.trained.argmax())


def _sharing(row: TokenRow, shared: int) -> TokenRow:
    """The row sharing its prompt, without what a template writes behind the answer: nothing depends on that."""
    end = _last(row.trained) + 1
    return TokenRow(tokens=row.tokens[:end], trained=row.trained[:end], shared=shared)


def _last(trained: Flags) -> int:
    return int(np.flatnonzero(trained)[-1])
