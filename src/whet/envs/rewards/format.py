"""The layout of DeepSeek-R1 (2501.12948): thinking inside one pair of tags, the answer inside another."""

from __future__ import annotations

import re

from whet.envs.base import Attempt, Grade

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LAYOUT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def well_formed(attempt: Attempt) -> Grade:
    """1 if the answer is `<think>...</think><answer>...</answer>`: each tag once, nothing else but white space.

    An empty thinking block is well formed: whether thinking pays is for the other rewards to teach.
    """
    text = attempt.answer
    once = all(text.count(tag) == 1 for tag in TAGS)
    return Grade(value=float(once and _LAYOUT.fullmatch(text) is not None))
