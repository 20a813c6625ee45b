"""Rewards that do not judge: how an answer is written (layout, language, length, repetitions), the environment's own.

Layouts are thinking inside one pair of tags and the answer inside another, as papers and libraries define them. Lengths
are sampled tokens, over all turns of an answer. `cosine` and `GroupLength` need to know whether the answer is right
(`Attempt.correct`, from the first reward that judges) and do not apply where that is not known.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from whet.envs.base import Attempt, Grade, OfAnyTask
from whet.envs.rewards.answers import after_thinking
from whet.formulas.step import progress as made_progress

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


UNKNOWN = Grade(value=None, note="no reward judged the answer")


def cosine(attempt: Attempt, *, right: tuple[float, float], wrong: tuple[float, float], exceeded: float) -> Grade:
    """r_L + (r_0 - r_L) (1 + cos(pi L / L_max)) / 2 with r_0, r_L by right or wrong (Yeo 2502.03373, section 4.2).

    L is the number of sampled tokens, held to L_max, how many there could be. An answer that was cut off gets
    `exceeded`.
    """
    if attempt.truncated:
        return Grade(value=exceeded)
    if attempt.correct is None:
        return UNKNOWN
    shortest, longest = right if attempt.correct else wrong
    share = min(1.0, len(attempt.completion_tokens) / attempt.max_tokens)
    return Grade(value=longest + (shortest - longest) * (1 + math.cos(math.pi * share)) / 2)


def overlong(attempt: Attempt, *, cache_tokens: int) -> Grade:
    """0 up to L_max - L_cache sampled tokens, then falling linearly to -1 at L_max, and -1 beyond.

    L is the number of sampled tokens, L_max how many there could be (`Attempt.max_tokens`), L_cache `cache_tokens`, or
    all of L_max where that is less.
    """
    cache = min(cache_tokens, attempt.max_tokens)
    left = attempt.max_tokens - len(attempt.completion_tokens)
    return Grade(value=max(-1.0, min(0, left - cache) / cache))


def length(attempt: Attempt, *, above_tokens: int) -> Grade:
    """1 if L > above_tokens, else 0: over many answers, the share of long ones."""
    return Grade(value=float(len(attempt.completion_tokens) > above_tokens))


def repetition(attempt: Attempt, *, ngram: int) -> Grade:
    """-(1 - distinct / all) over the answer's n-grams of sampled tokens: 0 without repetition, towards -1 in a loop."""
    tokens = attempt.completion_tokens
    grams = [tokens[at : at + ngram] for at in range(len(tokens) - ngram + 1)]
    return Grade(value=len(set(grams)) / len(grams) - 1 if grams else 0.0)


def of_environment(attempt: Attempt) -> Grade:
    """The sum of the environment's rewards of the play; not applicable where it gives none."""
    if not attempt.worth:
        return Grade(value=None)
    parts = attempt.worth if len(attempt.worth) > 1 else {}
    return Grade(value=sum(attempt.worth.values()), metrics=parts)


def of_turns(attempt: Attempt, *, progress: bool, smear: float) -> Grade:
    """The sum of the rewards of single turns, and each of them; with `progress`, of what each changed."""
    given = attempt.turn_rewards
    turns = made_progress(given, smear=smear) if progress else [value or 0.0 for value in given]
    return Grade(value=sum(turns), turns=tuple(turns))


def calls(attempt: Attempt) -> Grade:
    """The number of calls that the policy tried."""
    return Grade(value=float(sum(len(message.tool_calls) for message in attempt.messages)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLength(OfAnyTask):
    """Short answers of a group over long ones (Kimi k1.5, 2501.12599, section 2.3.3).

    l = 0.5 - (L - shortest) / (longest - shortest) over the answers to one prompt: l for a right answer, min(0, l) for
    a wrong one, and 0 where all are equally long.
    """

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt; attempts at the same task are a group."""
        lengths: dict[str, list[int]] = {}
        for attempt in attempts:
            lengths.setdefault(attempt.task.id, []).append(len(attempt.completion_tokens))
        return [self._grade(attempt, lengths[attempt.task.id]) for attempt in attempts]

    def _grade(self, attempt: Attempt, lengths: Sequence[int]) -> Grade:
        if attempt.correct is None:
            return UNKNOWN
        shortest, longest = min(lengths), max(lengths)
        if shortest == longest:
            return Grade(value=0.0)
        share = 0.5 - (len(attempt.completion_tokens) - shortest) / (longest - shortest)
        return Grade(value=share if attempt.correct else min(0.0, share))
