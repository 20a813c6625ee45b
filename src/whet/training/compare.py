"""Comparisons, judged and rated answers through the data gate: answers to one prompt become rows that share its tokens.

The gate of `training.gate` holds for every answer: it has a trained stop token, is not longer than allowed and is never
cut. Here it is checked as well that the prompt is tokenised the same under all of them, since it is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Literal, TypeVar

import numpy as np

from whet.data.base import Comparison, Conversation, Judged, Origin, Rated
from whet.data.faults import BadRow, Dropped, Rejects
from whet.errors import DataError
from whet.records import Atom, Flags, Message, TokenRow
from whet.templates.base import Template
from whet.training.gate import RowRule, check_row, token_row, write_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A comparison as tokens."""

    origin: Origin
    atom: Atom
    """One row for each answer, the best first, which share the prompt; every token of an answer is trained."""
    margin: float | None
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRow:
    """An answer that was called good or bad, as tokens; the prompt is what it has to share."""

    origin: Origin
    row: TokenRow
    good: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedRow:
    """An answer with its ratings, as tokens; the prompt is what it has to share."""

    origin: Origin
    row: TokenRow
    ratings: Mapping[str, float]


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


Passed = TypeVar("Passed", Compared, JudgedRow, RatedRow)
Read = TypeVar("Read", Comparison, Judged, Rated)
OnBadRow = Literal["error", "drop"]


def tokenise_comparisons(
    comparisons: Sequence[Comparison], template: Template, *, max_length: int, on_bad_row: OnBadRow
) -> tuple[list[Compared], Dropped, PreferenceStats]:
    """All comparisons as atoms, in order, what was left out, and how long things are.

    `on_bad_row="error"`: raises `BadRow` (a `DataError`) for the first comparison that cannot be trained on; `"drop"`:
    leaves such out and counts them. Raises `DataError` where none is left.
    """
    passed, dropped = _all(comparisons, lambda each: _compared(each, template, max_length), on_bad_row)
    pairs = [pair for each in passed for pair in combinations([row.trained_count for row in each.atom.rows], 2)]
    rows = [row for each in passed for row in each.atom.rows]
    stats = PreferenceStats(
        rows=len(passed),
        answers=len(rows),
        tokens=sum(each.atom.cost for each in passed),
        trained_tokens=sum(row.trained_count for row in rows),
        length_max=max(len(row.tokens) for row in rows),
        mean_better=fmean(better for better, _ in pairs),
        mean_worse=fmean(worse for _, worse in pairs),
        longer_wins=fmean((better > worse) + (better == worse) / 2 for better, worse in pairs),
        left_out=sum(comparison.tied for comparison in comparisons),
    )
    return passed, dropped, stats


def tokenise_judged(
    judged: Sequence[Judged], template: Template, *, max_length: int, on_bad_row: OnBadRow
) -> tuple[list[JudgedRow], Dropped, PreferenceStats]:
    """All judged answers as rows, in order, what was left out, and how long things are; raises as comparisons do."""

    def row_of(each: Judged) -> JudgedRow:
        return JudgedRow(origin=each.origin, row=_single(each, template, max_length), good=each.good)

    passed, dropped = _all(judged, row_of, on_bad_row)
    lengths = {good: [each.row.trained_count for each in passed if each.good is good] for good in (True, False)}
    stats = PreferenceStats(
        rows=len(passed),
        answers=len(passed),
        tokens=sum(len(each.row.tokens) for each in passed),
        trained_tokens=sum(each.row.trained_count for each in passed),
        length_max=max(len(each.row.tokens) for each in passed),
        mean_better=fmean(lengths[True]) if lengths[True] else float("nan"),
        mean_worse=fmean(lengths[False]) if lengths[False] else float("nan"),
        longer_wins=float("nan"),
        left_out=sum(each.left_out for each in judged),
    )
    return passed, dropped, stats


def tokenise_rated(
    rated: Sequence[Rated], template: Template, *, max_length: int, on_bad_row: OnBadRow
) -> tuple[list[RatedRow], Dropped]:
    """All rated answers as rows, in order, and what was left out; raises as comparisons do."""

    def row_of(each: Rated) -> RatedRow:
        return RatedRow(origin=each.origin, row=_single(each, template, max_length), ratings=each.ratings)

    return _all(rated, row_of, on_bad_row)


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


# ----------------------------------------------------------------------------------------------- helpers


def _all(
    given: Sequence[Read], convert: Callable[[Read], Passed], on_bad_row: OnBadRow
) -> tuple[list[Passed], Dropped]:
    rejects = Rejects(on_bad_row)
    passed: list[Passed] = []
    for each in given:
        try:
            passed.append(convert(each))
        except BadRow as bad:
            rejects.add(bad)
    if not passed:
        dropped = rejects.dropped
        raise DataError(f"nothing to train on; {dropped.describe() if dropped.total else 'the data set has no rows'}")
    return passed, rejects.dropped


def _compared(comparison: Comparison, template: Template, max_length: int) -> Compared:
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
    atom = Atom(rows=tuple(_sharing(row, shared) for row in rows))
    return Compared(origin=origin, atom=atom, margin=comparison.margin, confidence=comparison.confidence)


def _single(each: Judged | Rated, template: Template, max_length: int) -> TokenRow:
    """One answer that is compared with no other."""
    row = _answer_row(each, each.answer, template, max_length, "")
    return _sharing(row, _prompt_length(row))


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
