"""Episodes become token rows: tokens exactly as sampled, trained where the policy wrote them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from whet.models.marks import RoleTable
from whet.records import Atom, Episode, StepScore, TokenRow, TokenStep, Turn
from whet.templates.places import completing_tokens

T = TypeVar("T")


def to_rows(episode: Episode) -> list[TokenRow]:
    """The episode as rows with the column `sampler_logp`.

    Turns whose prompt continues the tokens before it join one row, in which observations are context. Where a
    template rewrites history, a new row begins.
    """
    rows: list[TokenRow] = []
    turns: list[Turn] = []

    def close() -> None:
        if turns:
            rows.append(_row(turns, shared=len(episode.turns[0].prompt) if not rows else 0))
            turns.clear()

    for turn in episode.turns:
        if turns and not _continues(turns[-1], turn):
            close()
        turns.append(turn)
    close()
    return rows


def minibatches(things: Sequence[T], parts: int) -> list[Sequence[T]]:
    """So many parts of nearly equal size; none is empty."""
    bounds = [len(things) * i // parts for i in range(parts + 1)]
    return [things[low:high] for low, high in pairwise(bounds) if high > low]


def with_roles(row: TokenRow, table: RoleTable) -> TokenRow:
    """The row with the column `role`: where each trained token stands, by what precedes it."""
    return row.with_columns(role=table.roles(row.tokens)[np.flatnonzero(row.trained) - 1])


def only_roles(row: TokenRow, roles: Collection[int]) -> TokenRow:
    """The row with the tokens of these roles trained alone."""
    return only(row, np.isin(row.columns["role"], list(roles)))


def only(row: TokenRow, kept_T: npt.NDArray[np.bool_]) -> TokenRow:
    """The row with these of its trained tokens trained: the others are context, and in no denominator."""
    trained = row.trained.copy()
    trained[np.flatnonzero(row.trained)[~kept_T]] = False
    return replace(row, trained=trained, columns={name: column[kept_T] for name, column in row.columns.items()})


def _continues(before: Turn, turn: Turn) -> bool:
    """Whether the prompt begins with all tokens of the turn before it."""
    start, written = len(before.prompt), before.completion.tokens
    end = start + len(written)
    return np.array_equal(turn.prompt[:start], before.prompt) and np.array_equal(turn.prompt[start:end], written)


def _row(turns: Sequence[Turn], *, shared: int) -> TokenRow:
    """Turns that continue one another: the last one has all tokens of those before it."""
    last = turns[-1]
    tokens = np.concatenate([last.prompt, last.completion.tokens])
    trained = np.zeros(len(tokens), np.bool_)
    for turn in turns:
        trained[len(turn.prompt) : len(turn.prompt) + len(turn.completion.tokens)] = True
    logps = np.concatenate([turn.completion.logprobs for turn in turns])
    return TokenRow(tokens=tokens, trained=trained, columns={"sampler_logp": logps}, shared=shared)


def to_token_steps(
    turn: Turn, answer: str, steps: Sequence[StepScore], decode: Callable[[Sequence[int]], str]
) -> tuple[TokenStep, ...]:
    """The steps of an answer at the sampled tokens that complete them; nothing is tokenized again.

    `answer` is what the turn's tokens spell, or a part of that.
    """
    lasts = completing_tokens(turn.completion.tokens.tolist(), answer, [step.end for step in steps], decode)
    return tuple(TokenStep(last=last, value=step.value) for last, step in zip(lasts, steps, strict=True))


def to_atoms(rows: Sequence[TokenRow]) -> list[Atom]:
    """Rows that begin with the same shared prompt become one atom, whose prompt is computed once."""
    groups: dict[bytes, list[TokenRow]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    alone = [Atom(rows=(row,)) for row in groups.pop(b"", [])]
    return [Atom(rows=tuple(group)) for group in groups.values()] + alone
