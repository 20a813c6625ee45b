"""Episodes become token rows: tokens exactly as sampled, trained where the policy wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from whet.records import Atom, Episode, StepScore, TokenRow, TokenStep, Turn
from whet.templates.places import completing_tokens


def to_rows(episode: Episode) -> list[TokenRow]:
    """The episode as rows with the column `sampler_logp`.

    Turns whose prompt continues the tokens before it join one row, in which observations are context. Where a
    template rewrites history, a new row begins.
    """
    rows: list[TokenRow] = []
    tokens: list[int] = []
    trained: list[bool] = []
    logps: list[float] = []

    def close() -> None:
        if tokens:
            columns = {"sampler_logp": tuple(logps)}
            shared = len(episode.turns[0].prompt) if not rows else 0
            rows.append(TokenRow(tokens=tuple(tokens), trained=tuple(trained), columns=columns, shared=shared))

    for turn in episode.turns:
        if list(turn.prompt[: len(tokens)]) != tokens:
            close()
            tokens, trained, logps = [], [], []
        tokens += turn.prompt[len(tokens) :]
        trained += [False] * (len(tokens) - len(trained))
        tokens += turn.completion.tokens
        trained += [True] * len(turn.completion.tokens)
        logps += turn.completion.logprobs
    close()
    return rows


def to_token_steps(
    turn: Turn, answer: str, steps: Sequence[StepScore], decode: Callable[[Sequence[int]], str]
) -> tuple[TokenStep, ...]:
    """The steps of an answer at the sampled tokens that complete them; nothing is tokenized again.

    `answer` is what the turn's tokens spell, or a part of that.
    """
    lasts = completing_tokens(turn.completion.tokens, answer, [step.end for step in steps], decode)
    return tuple(TokenStep(last=last, value=step.value) for last, step in zip(lasts, steps, strict=True))


def to_atoms(rows: Sequence[TokenRow]) -> list[Atom]:
    """Rows that begin with the same shared prompt become one atom, whose prompt is computed once."""
    groups: dict[tuple[int, ...], list[TokenRow]] = {}
    for row in rows:
        groups.setdefault(row.tokens[: row.shared], []).append(row)
    alone = [Atom(rows=(row,)) for row in groups.pop((), [])]
    return [Atom(rows=tuple(group)) for group in groups.values()] + alone
