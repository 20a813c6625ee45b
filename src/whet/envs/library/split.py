"""Held-out problems are chosen by a hash of the problem itself, so no seed and no count can mix the two halves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import TypeVar

from whet.config import GeneratedConfig

HELD_OUT = 10
"""One problem in so many is held out."""
DRAWS = 10_000
"""Most redraws for one problem; a problem space that has none of the wanted half is our mistake."""

Problem = TypeVar("Problem")


def draw_problem(
    config: GeneratedConfig, index: int, draw: Callable[[Random], Problem], identity: Callable[[Problem], str]
) -> Problem:
    """Problem `index` of the config's half: drawn anew until its identity falls into that half.

    `identity` must be the same for problems that are the same but for their writing, such as 3+5 and 5+3.
    """
    random = Random(f"{config.generate}/{config.seed}/{config.split}/{index}")
    for _ in range(DRAWS):
        problem = draw(random)
        if held_out(identity(problem)) == (config.split == "test"):
            return problem
    raise AssertionError(f"{config.generate} has no problem for split {config.split}")


def held_out(identity: str) -> bool:
    """Whether the problem belongs to the test half, everywhere and always."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % HELD_OUT == 0
