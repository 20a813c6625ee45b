"""How much texts have in common: by their words, for near duplicates and for evaluation sets that leaked into data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

Words = tuple[str, ...]
COMMON = 10
"""Prompts of an evaluation set from which on a run of words is its wording and no leak (GPT-3, appendix C)."""
_WORD = re.compile(r"\w+|[-+*/=^<>%]")


def words(text: str) -> Words:
    """Its words and operators in lower case, without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def ngrams(text: str, n: int) -> set[Words]:
    """Its runs of n words; of a text with fewer the whole."""
    found = words(text)
    return {found[i : i + n] for i in range(max(1, len(found) - n + 1))} if found else set()


def jaccard(first: set[Words], second: set[Words]) -> float:
    """Shared n-grams over all n-grams, from 0 to 1; 1 for two empty sets."""
    return len(first & second) / len(first | second) if first | second else 1.0


def leaks(held_out: Iterable[Sequence[str]], n: int) -> set[Words]:
    """The n-grams by which the prompts of an evaluation set (each the texts of its messages) are known again.

    Those that more than `COMMON` different prompts share are their instruction, and tell nothing.
    """
    counts = Counter(gram for texts in set(map(tuple, held_out)) for gram in {g for t in texts for g in ngrams(t, n)})
    return {gram for gram, count in counts.items() if count <= COMMON}
