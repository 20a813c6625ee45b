"""Comparisons turned into questions whose right verdict is known: what a judge is trained on.

A pair is asked in both orders, so that the place of an answer tells nothing; an answer alone is asked about as often
good as bad.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

from whet.data.base import Comparison
from whet.envs.clients import ChatClient
from whet.envs.judges.ask import Question, conversation, read_reply
from whet.envs.judges.judge import FIRST, SECOND, Exchange, Wording, as_text
from whet.records import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A question as a task, with its right verdict."""

    question: Question
    prompt: tuple[Message, ...]
    verdict: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What a teacher said to a question; without a `completion` it is nothing to imitate."""

    completion: str | None
    failure: str = ""
    wrong: bool = False
    """Whether its verdict was another than the known one."""


def questions(
    comparison: Comparison, wording: Wording, *, form: Literal["pairs", "points"], reasoning: bool
) -> Iterator[Known]:
    """The questions about one comparison: every two of its answers in both orders, or its best and its worst alone."""
    asked = comparison.prompt
    # Without its folder: a run that was moved makes the same rows.
    origin = str(replace(comparison.origin, source=Path(comparison.origin.source).name))
    texts = [as_text(answer) for answer in comparison.answers]

    def known(question: Question, verdict: str) -> Known:
        prompt = conversation(question, reasoning=reasoning)
        return Known(question=question, prompt=prompt, verdict=verdict, origin=origin)

    if form == "points":
        yield known(wording.single(Exchange(asked=asked, answer=texts[0])), "Yes")
        yield known(wording.single(Exchange(asked=asked, answer=texts[-1])), "No")
        return
    for better, worse in combinations(texts, 2):
        yield known(wording.pair(asked, (better, worse)), FIRST)
        yield known(wording.pair(asked, (worse, better)), SECOND)


def teach(teacher: ChatClient, asked: Sequence[Known], *, max_tokens: int) -> list[Taught]:
    """What the teacher writes to each question, kept where its verdict is the known one."""
    replies = teacher.chat([known.prompt for known in asked], max_tokens=max_tokens)
    taught = []
    for known, reply in zip(asked, replies, strict=True):
        opinion = read_reply(reply, known.question)
        right = opinion.value == known.question.verdicts[known.verdict]
        taught.append(
            Taught(
                completion=opinion.reasons if right else None,
                failure=opinion.failure,
                wrong=opinion.value is not None and not right,
            )
        )
    return taught
