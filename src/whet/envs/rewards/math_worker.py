r"""The worker's side of the math reward: the rules of `reading` with sympy and Math-Verify, imported here alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from whet.envs.rewards.algebra import Sympy
from whet.envs.rewards.reader import read
from whet.envs.rewards.reading import answers
from whet.envs.rewards.values import Value

ALGEBRA = Sympy()
WARM = (
    r"\frac{\sqrt{2}}{2}+x^{2}-3(x+1)", r"\sin(2x)\cos x-\tan^2(x)", r"\ln 2+\log_{10}3", r"e^{x}\cdot 2^{n+1}",
    r"5!+\binom{n}{k}", r"\sqrt[3]{4x}-|x-1|", r"a_{n}+b_1", r"\frac{a+b}{c-d}(x-y)", r"2\pi r^2+\frac{\pi}{6}",
    r"-x y z+0.25x", r"f(x)+1",
)  # fmt: skip
"""Expressions after which the parser has met most of its grammar."""


def load() -> Callable[[Mapping[str, Any]], int]:
    """The function that answers payloads, warm: the parser learns its grammar as it reads, outside any deadline."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off; ours are on
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    for text in WARM:
        ALGEBRA.equal(text, f"{text}+1")
    ALGEBRA.otherwise("1 < x", "x > 1")
    return answer


def answer(payload: Mapping[str, Any]) -> int:
    """1 or 0: whether `answer` gives `gold`."""
    asked = {name: payload[name] for name in ("question", "marked", "tolerance")}
    return int(answers(_read(payload["gold"]), payload["gold"], payload["answer"], ALGEBRA, **asked))


@lru_cache(maxsize=4096)
def _read(gold: str) -> Value:
    return read(gold)
