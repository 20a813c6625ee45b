"""Texts as answers: when two say the same, and what is left of an expression without what never changes it."""

from __future__ import annotations

import re

from whet.envs.rewards.notation import untext


def same_words(left: str, right: str) -> bool:
    """Whether two texts have the same words in the same order; case, punctuation, articles and spaces aside."""
    ours, theirs = words(left), words(right)
    return bool(ours) and ours == theirs


def predicate(text: str) -> str:
    """What a sentence says of its subject (`The function is odd` says `odd`); a text without a verb says itself."""
    found = re.fullmatch(
        r"(?:[A-Z]|it\b|this\b).*?\b(?:is|are|was|were)\s+(?P<said>[^.!?]+)[.!?]?", text.strip(), re.DOTALL
    )
    return found["said"] if found else text


def words(text: str) -> list[str]:
    """The words, numbers and symbols of a text that count."""
    found = re.findall(r"\d+(?:[.,]\d+)*|\w+|[^\w\s.,;:!?'\"()\[\]{}$*`-]", untext(text).casefold())
    return [word for word in found if word not in ("a", "an", "the")] or found


def squeeze(text: str) -> str:
    """The text without what never changes an expression: spaces and braces around single characters."""
    text = re.sub(r"(?<=\d) (?=\d)", ";", untext(text))  # 4 2 is not 42
    text = re.sub(r"\s+(?![a-zA-Z])|(?<![a-zA-Z])\s+", "", text)
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", text)


def digits(text: str) -> int:
    """Significant digits of a decimal number."""
    return len(re.sub(r"\D", "", re.split(r"[eE*\\]", text)[0]).lstrip("0"))
