"""Soft overlong punishment (DAPO, 2503.14476, eq. 13)."""

from __future__ import annotations

from whet.envs.base import Attempt, Grade
from whet.errors import ConfigError


def overlong(attempt: Attempt, *, cache_tokens: int) -> Grade:
    """0 up to L_max - L_cache sampled tokens, then falling linearly to -1 at L_max, and -1 beyond.

    L is the number of sampled tokens, L_max the sampler's `max_tokens`, L_cache `cache_tokens`. Raises
    `ConfigError` where L_cache is larger than L_max: every completion would be punished.
    """
    if cache_tokens > attempt.max_tokens:
        raise ConfigError(
            f"rewards.overlong.cache_tokens is {cache_tokens}, more than sampling.max_tokens ({attempt.max_tokens})"
        )
    beyond = len(attempt.completion_tokens) - (attempt.max_tokens - cache_tokens)
    return Grade(value=-min(1.0, max(0, beyond) / cache_tokens))
