r"""The worker's side of the math reward: math-verify, imported here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from math_verify import parse, verify


def load() -> Callable[[Mapping[str, str]], int | None]:
    """The function that answers payloads."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off; ours are on
    return answer


def answer(payload: Mapping[str, str]) -> int | None:
    """1 or 0: whether `answer` equals `gold`, which goes first because `verify` is not symmetric (Math-Verify#10).

    None where `gold` cannot be read. Without an `answer`: 1 where it can.
    """
    gold = _read(payload["gold"])
    if all(isinstance(part, str) for part in gold):  # the text itself is all it found
        return None
    if "answer" not in payload:
        return 1
    return int(verify(gold, _read(payload["answer"]), timeout_seconds=None))


def _read(text: str) -> list[Any]:
    r"""math-verify's expressions. A bare expression becomes `$...$`: it reads LaTeX only where it is marked."""
    marked = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    read: list[Any] = parse(text if marked else f"${text}$", parsing_timeout=None)
    return read
