r"""The worker's side of the math reward: the rules of `reading` with sympy and Math-Verify, imported here alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from whet.envs.rewards.algebra import Sympy, reads
from whet.envs.rewards.reading import answers
from whet.envs.rewards.values import Formula, Items, Matrix, Named, Relation, Value, read

ALGEBRA = Sympy()
WARM = (
    r"\frac{\sqrt{2}}{2}+x^{2}-3(x+1)", r"\sin(2x)\cos x-\tan^2(x)", r"\ln 2+\log_{10}3", r"e^{x}\cdot 2^{n+1}", r"5!+\binom{n}{k}",
    r"\sqrt[3]{4x}-|x-1|", r"a_{n}+b_1", r"\frac{a+b}{c-d}(x-y)", r"2\pi r^2+\frac{\pi}{6}", r"-x y z+0.25x", r"f(x)+1",
)  # fmt: skip
"""Expressions after which the parser has met most of its grammar."""


def load() -> Callable[[Mapping[str, Any]], int | None]:
    """The function that answers payloads, warm: the parser learns its grammar as it reads, which no deadline should pay."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off; ours are on
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    for text in WARM:
        ALGEBRA.equal(text, f"{text}+1")
    ALGEBRA.otherwise("1 < x", "x > 1")
    return answer


def answer(payload: Mapping[str, Any]) -> int | None:
    """1 or 0: whether `answer` gives `gold`, None where the gold cannot be read; without an `answer`, whether it can."""
    gold = payload["gold"]
    value = _read(gold)
    if "answer" not in payload:
        return 1 if _readable(value) or ALGEBRA.otherwise(gold, gold) else None
    asked = {name: payload[name] for name in ("question", "marked", "tolerance")}
    if answers(value, gold, payload["answer"], ALGEBRA, **asked):
        return 1
    return 0 if _readable(value) or ALGEBRA.otherwise(gold, gold) else None


@lru_cache(maxsize=4096)
def _read(gold: str) -> Value:
    return read(gold)


def _readable(value: Value) -> bool:
    """Whether every expression in it parses."""
    match value:
        case Formula():
            return reads(value.text)
        case Items():
            return all(map(_readable, value.items))
        case Named():
            return _readable(value.value)
        case Matrix():
            return all(_readable(cell) for row in value.rows for cell in row)
        case Relation():
            return all(map(reads, value.sides))
        case _:
            return True
