"""Answers of known worth: right with its work shown > right > wrong with work > wrong.

Preferences that people state are noisy; these follow from a score that is known, so that what a method learned from
them can be told exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from whet.config import GeneratedConfig

OBJECTIVES = ("right", "worked", "brief")
"""What generated answers are rated by."""
LONG = 100
"""Characters of an answer that is not brief at all."""


def rate(*, right: bool, worked: bool, answer: str) -> dict[str, float]:
    """An answer by each of the `OBJECTIVES`, from 0 to 1."""
    return {"right": float(right), "worked": float(worked), "brief": max(0.0, 1 - len(answer) / LONG)}


def worth(*, right: bool, worked: bool) -> float:
    """(2 right + worked) / 3: being right counts for more than showing the work."""
    return (2 * right + worked) / 3


def pick(config: GeneratedConfig, index: int, kinds: Sequence[str]) -> tuple[str, ...]:
    """`config.answers` of the four kinds (the best first), in that order; which ones depends on the index alone."""
    random = Random(f"{config.generate} ranking/{config.seed}/{index}")
    return tuple(kinds[place] for place in sorted(random.sample(range(len(kinds)), config.answers)))


def as_written(work: str, answer: object) -> str:
    """An answer in the demonstrations' form."""
    return f"<think>{work}</think><answer>{answer}</answer>"
