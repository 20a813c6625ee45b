r"""The worker's side of the math reward: math-verify, imported here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

LATEX = LatexExtractionConfig()
UNITS_ARE_SYMBOLS = [
    replace(LATEX, normalization_config=replace(LATEX.normalization_config, units=False)),
    ExprExtractionConfig(),
]


def load() -> Callable[[Mapping[str, str]], int | None]:
    """The function that answers payloads, warm: the first comparison builds parsers, which no deadline should pay."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off; ours are on
    answer({"gold": "\\frac{1}{2}", "answer": "x^2"})
    return answer


def answer(payload: Mapping[str, str]) -> int | None:
    """1 or 0: whether `answer` equals `gold`, which goes first because `verify` is not symmetric (Math-Verify#10).

    None where `gold` cannot be read. Without an `answer`: 1 where it can.
    """
    gold = _read(payload["gold"])
    if not _understood(gold):
        return None
    if "answer" not in payload:
        return 1
    return int(verify(gold, _read(payload["answer"]), timeout_seconds=None))


def _read(text: str) -> list[Any]:
    r"""math-verify's expressions. It reads LaTeX only where it is marked, so a bare answer is wrapped in `$`.

    It drops units first (`5 m` is 5) and thereby breaks `a + b`, where b is no bit: what it then cannot read, it
    reads with units as symbols.
    """
    marked = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    wrapped = text if marked else f"${text}$"
    read: list[Any] = parse(wrapped, parsing_timeout=None)
    return read if _understood(read) else parse(wrapped, UNITS_ARE_SYMBOLS, parsing_timeout=None)


def _understood(read: list[Any]) -> bool:
    """Whether there is an expression among what was read; else it is only the text again."""
    return any(not isinstance(part, str) for part in read)
