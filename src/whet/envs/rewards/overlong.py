"""Soft overlong punishment (DAPO, 2503.14476, eq. 13)."""

from __future__ import annotations

from whet.envs.base import Attempt, Grade


def overlong(attempt: Attempt, *, cache_tokens: int) -> Grade:
    """0 up to L_max - L_cache sampled tokens, then falling linearly to -1 at L_max, and -1 beyond.

    L is the number of sampled tokens, L_max how many there could be (`Attempt.max_tokens`), L_cache `cache_tokens`, or
    all of L_max where that is less.
    """
    cache = min(cache_tokens, attempt.max_tokens)
    left = attempt.max_tokens - len(attempt.completion_tokens)
    return Grade(value=max(-1.0, min(0, left - cache) / cache))
