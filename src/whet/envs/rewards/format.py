"""Layouts of completions: thinking inside one pair of tags, the answer inside another, as papers and libraries ask."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from whet.envs.base import Attempt, Grade
from whet.envs.rewards.answers import after_thinking

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LINES = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
"""The tags with the line breaks that open-r1 counts."""
_STRICT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_THINK = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)


def well_formed(attempt: Attempt, *, form: str = "strict") -> Grade:
    """1 if the answer has the layout `form`, else 0; `tags` has quarters.

    strict (DeepSeek-R1, 2501.12948): `<think>...</think><answer>...</answer>`, each tag once, nothing else but white
    space. soft: these tags in this order, whatever stands around. think (TRL's `think_format_reward`): one block of
    thinking, then anything. open_r1 (its `format_reward`): strict, each tag on a line of its own. tags (open-r1's
    `tag_count_reward`): a quarter for each tag that stands there once, on its line.

    An empty thinking block is well formed: whether thinking pays is for the other rewards to teach.
    """
    text = attempt.answer
    match form:
        case "strict":
            right = all(text.count(tag) == 1 for tag in TAGS) and _STRICT.fullmatch(text) is not None
        case "soft":
            right = _in_order(text, TAGS)
        case "think":
            right = _THINK.fullmatch(text) is not None
        case "open_r1":
            opened, closed = LINES[0], LINES[-1]
            inside = text.removeprefix(opened).removesuffix(closed)
            right = text == f"{opened}{inside}{closed}" and "\n</think>\n<answer>\n" in inside
        case _:
            assert form == "tags", "the recipe knows these forms"
            return Grade(value=sum(text.count(tag) == 1 for tag in LINES) / len(LINES))
    return Grade(value=float(right))


def _in_order(text: str, tags: Sequence[str]) -> bool:
    """Whether the tags stand there in this order: in one pass, where a regular expression would try every start."""
    place = 0
    for tag in tags:
        if (place := text.find(tag, place)) < 0:
            return False
        place += len(tag)
    return True


def consistent(attempt: Attempt, *, script: str, thinking: bool = True) -> Grade:
    """The share of words in one script, by their letters: language consistency (DeepSeek-R1, section 2.3.2).

    `script` is Unicode's word for it (LATIN, CYRILLIC, ARABIC, CJK ...). A character of Chinese or Japanese is a word.
    Code, numbers and formulas have no script and count for nothing; an answer without words is 0.
    """
    text = attempt.answer if thinking else after_thinking(attempt.answer)
    words = re.findall(r"(?<!\\)\b[^\W\d_]+", text)
    counted = [letter for word in words for letter in (word if _ideographic(word[0]) else word[0])]
    if not counted:
        return Grade(value=0.0)
    return Grade(value=sum(unicodedata.name(letter, "").startswith(script) for letter in counted) / len(counted))


def _ideographic(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
