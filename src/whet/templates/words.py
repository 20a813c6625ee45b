"""Tokens of texts, from the tokens of their words, which are remembered.

Many tokenizers cut a text with a regular expression and look at each part alone. None of the expressions below matches
across a space that stands behind a letter, a digit or a mark of ASCII, or looks behind: what follows such a space, the
space included, has the same tokens wherever it stands. So a text is cut there, and the tokenizer gets only words that
it has not had lately: a tenth of real texts, and the rest takes a fifth of its time.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, filterfalse
from typing import Any

KEPT = 2**21
"""Characters of words that are remembered: some 300,000 words and 70 MB."""

WORDS = re.compile(r" ?[^ ]*(?:(?<![!-~\w]) [^ ]*)*")

REGEX = {
    # Qwen 2 to 3; Llama 3; gpt-oss; DeepSeek V3, in three steps
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": True,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": True,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": True,
    r"\p{N}{1,3}": False,
    "[一-龥぀-ゟ゠-ヿ]+": False,
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+": True,
}
"""Expressions that never match across such a space, and whether they always cut there. None of them looks behind."""


class Words:
    """The words of one tokenizer."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[str, bytes] = {}
        self._size = 0

    def tokens(self, texts: Sequence[str], *, special: bool = False) -> list[bytes]:
        """The tokens of each text, 4 bytes each; `special`: with those that the tokenizer puts around a text.

        Texts may be tokenized by several threads at once.
        """
        known = self._known
        cut = [WORDS.findall(text) for text in texts]
        new = list(dict.fromkeys(filterfalse(known.__contains__, chain.from_iterable(cut))))
        made = self._backend.encode_batch_fast(new, add_special_tokens=False)
        known.update(zip(new, (array("i", encoding.ids).tobytes() for encoding in made), strict=True))
        self._size += sum(map(len, new))
        if self._size > KEPT:
            self._known, self._size = {}, 0
        before, after = self._around if special else (b"", b"")
        return [before + b"".join(map(known.__getitem__, words)) + after for words in cut]

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        word, whole = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next(place for place in range(len(whole)) if whole[place : place + len(word)] == word)
        return array("i", whole[:at]).tobytes(), array("i", whole[at + len(word) :]).tobytes()


def words_of(tokenizer: Any) -> Words | None:
    """Where it gives such words the same tokens wherever they stand; None where that is not sure."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one that is written in Python
        return None
    added = backend.get_added_tokens_decoder().values()
    whole = _state(backend.pre_tokenizer)
    steps = [_cuts(step) for step in whole.get("pretokenizers", [whole])]
    sure = (
        not any(" " in each.content or each.lstrip or each.rstrip or each.single_word for each in added)
        and _state(backend.normalizer) in ({}, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})
        and not getattr(backend.model, "dropout", None)
        and None not in steps
        and any(steps)
    )
    return Words(backend) if sure else None


def _cuts(step: dict[str, Any]) -> bool | None:
    """Whether a step of cutting always cuts there; None: it may look at more than a word."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(gpt2)}:
            return gpt2
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return REGEX.get(regex)
        case {"type": "Digits"}:
            return False
    return None


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file has it."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state
