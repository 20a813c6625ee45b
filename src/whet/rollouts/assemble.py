"""Episodes become token rows: tokens exactly as sampled, trained where the policy wrote them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from whet.records import Atom, Episode, StepScore, TokenRow, TokenStep, Turn


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

    A token completes a step if decoding the tokens up to it shows the step's last character and decoding fewer does
    not (half a character decodes to something else than what becomes of it, and does not count as shown). The stop
    token belongs to a step that ends with the answer. `answer` is what the turn's tokens spell, or a part of that.
    """
    tokens = turn.completion.tokens
    text = decode(tokens)
    before = text.find(answer)
    assert before >= 0, "an answer is spelled by its tokens"

    def shown(count: int) -> int:
        part = decode(tokens[:count])
        return next((at for at, (left, right) in enumerate(zip(part, text, strict=False)) if left != right), len(part))

    lasts = [bisect_left(range(1, len(tokens) + 1), before + step.end, key=shown) for step in steps]
    if steps[-1].end == len(answer):
        lasts[-1] = len(tokens) - 1
    return tuple(TokenStep(last=last, value=step.value) for last, step in zip(lasts, steps, strict=True))


def to_atoms(rows: Sequence[TokenRow]) -> list[Atom]:
    """Rows that begin with the same shared prompt become one atom, whose prompt is computed once."""
    groups: dict[tuple[int, ...], list[TokenRow]] = {}
    for row in rows:
        groups.setdefault(row.tokens[: row.shared], []).append(row)
    alone = [Atom(rows=(row,)) for row in groups.pop((), [])]
    return [Atom(rows=tuple(group)) for group in groups.values()] + alone
