"""Rewards for length and against repetition. Lengths are sampled tokens, over all turns of an answer.

`cosine` and `GroupLength` ask whether the answer is right (`Attempt.correct`, the word of the first reward that
judges) and say nothing of an answer of which that is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whet.envs.base import Attempt, Grade, OfAnyTask

UNKNOWN = Grade(value=None, note="no reward judged the answer")


def cosine(attempt: Attempt, *, right: tuple[float, float], wrong: tuple[float, float], exceeded: float) -> Grade:
    """r_L + (r_0 - r_L) (1 + cos(pi L / L_max)) / 2 with r_0, r_L by right or wrong (Yeo 2502.03373, section 4.2).

    L is the number of sampled tokens, held to L_max, how many there could be. An answer that was cut off gets
    `exceeded`.
    """
    if attempt.truncated:
        return Grade(value=exceeded)
    if attempt.correct is None:
        return UNKNOWN
    shortest, longest = right if attempt.correct else wrong
    share = min(1.0, len(attempt.completion_tokens) / attempt.max_tokens)
    return Grade(value=longest + (shortest - longest) * (1 + math.cos(math.pi * share)) / 2)


def overlong(attempt: Attempt, *, cache_tokens: int) -> Grade:
    """0 up to L_max - L_cache sampled tokens, then falling linearly to -1 at L_max, and -1 beyond.

    L is the number of sampled tokens, L_max how many there could be (`Attempt.max_tokens`), L_cache `cache_tokens`, or
    all of L_max where that is less.
    """
    cache = min(cache_tokens, attempt.max_tokens)
    left = attempt.max_tokens - len(attempt.completion_tokens)
    return Grade(value=max(-1.0, min(0, left - cache) / cache))


def length(attempt: Attempt, *, above_tokens: int) -> Grade:
    """1 if L > above_tokens, else 0: over many answers, the share of long ones."""
    return Grade(value=float(len(attempt.completion_tokens) > above_tokens))


def repetition(attempt: Attempt, *, ngram: int) -> Grade:
    """-(1 - distinct / all) over the answer's n-grams of sampled tokens: 0 without repetition, towards -1 in a loop."""
    tokens = attempt.completion_tokens
    grams = [tokens[at : at + ngram] for at in range(len(tokens) - ngram + 1)]
    return Grade(value=len(set(grams)) / len(grams) - 1 if grams else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLength(OfAnyTask):
    """Short answers of a group over long ones (Kimi k1.5, 2501.12599, section 2.3.3).

    l = 0.5 - (L - shortest) / (longest - shortest) over the answers to one prompt: l for a right answer, min(0, l) for
    a wrong one, and 0 where all are equally long.
    """

    name: str
    weight: float

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt; attempts at the same task are a group."""
        lengths: dict[str, list[int]] = {}
        for attempt in attempts:
            lengths.setdefault(attempt.task.id, []).append(len(attempt.completion_tokens))
        return [self._grade(attempt, lengths[attempt.task.id]) for attempt in attempts]

    def _grade(self, attempt: Attempt, lengths: Sequence[int]) -> Grade:
        if attempt.correct is None:
            return UNKNOWN
        shortest, longest = min(lengths), max(lengths)
        if shortest == longest:
            return Grade(value=0.0)
        share = 0.5 - (len(attempt.completion_tokens) - shortest) / (longest - shortest)
        return Grade(value=share if attempt.correct else min(0.0, share))
