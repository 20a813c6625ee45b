"""Asking a judge one question with a few possible verdicts, and reading what it says: strictly, or not at all.

Two readers behind one door. The text reader takes the last line, which must be `Verdict: X` with one of the words
that were offered; whatever else comes is no verdict, never a guess. The probability reader asks the model itself how
likely each word is as the whole answer, and takes the mean (GenRM, 2408.15240; d-RLAIF, 2309.00267).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Protocol

from whet.envs.base import Chat
from whet.records import Message, Reply

LAST_LINE = re.compile(r"[\s*_`]*verdict\s*:[\s*_`]*([^\s*_`.]+)[\s*_`.]*", re.IGNORECASE)
REASONS = "First give your reasons in a few sentences."
UNREAD = 120
"""Characters shown of words that are no verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be decided, and what each possible verdict is worth."""

    text: str
    verdicts: Mapping[str, float]
    """Word to value, in the order in which they are offered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """A judge's word on one question. `value is None` means: none could be had, and `failure` says why."""

    value: float | None
    failure: str = ""
    timed_out: bool = False
    unparsed: bool = False
    """Whether the judge did answer, and no verdict could be read."""
    reasons: str = ""
    """What it wrote, where it wrote anything."""


class Reader(Protocol):
    """Asks questions and reads the answers."""

    def read(self, questions: Sequence[Question]) -> list[Opinion]:
        """One opinion on each question, in order."""

    def close(self) -> None:
        """Let the judge go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReader:
    """Verdicts from what the judge writes; the mean over `votes`, of which more than half must be readable."""

    chat: Chat
    max_tokens: int
    reasoning: bool = False
    votes: int = 1

    def read(self, questions: Sequence[Question]) -> list[Opinion]:
        """One opinion on each question."""
        asked = [conversation(question, reasoning=self.reasoning) for question in questions for _ in range(self.votes)]
        replies = self.chat.chat(asked, max_tokens=self.max_tokens)
        return [
            _majority([read_reply(reply, question) for reply in replies[i * self.votes : (i + 1) * self.votes]])
            for i, question in enumerate(questions)
        ]

    def close(self) -> None:
        """Let the chat go."""
        self.chat.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbabilityReader:
    """The expected verdict under the model's own probabilities, after its reasons where it is to give any."""

    chat: Chat
    max_tokens: int
    reasoning: bool = False
    votes: int = 1

    def read(self, questions: Sequence[Question]) -> list[Opinion]:
        """One opinion on each question. With reasons: the mean over `votes` of them (GenRM-CoT)."""
        asked = [conversation(question, reasoning=False) for question in questions]
        if not self.reasoning:
            return self._expected(asked, questions)
        thinking = [_thinking(question) for question in questions for _ in range(self.votes)]
        replies = self.chat.chat(thinking, max_tokens=self.max_tokens)
        opinions = self._after(thinking, replies, [q for q in questions for _ in range(self.votes)])
        return [_majority(opinions[i * self.votes : (i + 1) * self.votes]) for i in range(len(questions))]

    def close(self) -> None:
        """Let the chat go."""
        self.chat.close()

    def _after(
        self, thinking: Sequence[Sequence[Message]], replies: Sequence[Reply], questions: Sequence[Question]
    ) -> list[Opinion]:
        """Opinions after the reasons in `replies`; where there are none, there is no opinion."""
        there = [i for i, reply in enumerate(replies) if reply.message is not None]
        reasoned = []
        for i in there:
            message = replies[i].message
            assert message is not None
            reasoned.append((*thinking[i], message, Message(role="user", content=demand(questions[i], reasons=False))))
        found = dict(zip(there, self._expected(reasoned, [questions[i] for i in there]), strict=True))
        return [
            found[i] if i in found else Opinion(value=None, failure=reply.failure, timed_out=reply.timed_out)
            for i, reply in enumerate(replies)
        ]

    def _expected(self, asked: Sequence[Sequence[Message]], questions: Sequence[Question]) -> list[Opinion]:
        """The mean verdict of each; questions with the same words go through the model together."""
        found: dict[int, Opinion] = {}
        for words in dict.fromkeys(tuple(question.verdicts) for question in questions):
            places = [i for i, question in enumerate(questions) if tuple(question.verdicts) == words]
            answers = self.chat.probabilities([asked[i] for i in places], [f"Verdict: {word}" for word in words])
            for place, chances in zip(places, answers, strict=True):
                found[place] = _mean_verdict(chances, questions[place])
        return [found[i] for i in range(len(questions))]


def conversation(question: Question, *, reasoning: bool) -> tuple[Message, ...]:
    """The question as the judge gets it: one user message, which every chat template can write."""
    return (Message(role="user", content=f"{question.text}\n\n{demand(question, reasons=reasoning)}"),)


def demand(question: Question, *, reasons: bool) -> str:
    """What the judge is to write, and how."""
    words = ", ".join(question.verdicts)
    if reasons:
        return f"{REASONS} Your last line must then be `Verdict: X`, where X is one of: {words}."
    return f"Answer with the one line `Verdict: X`, where X is one of: {words}."


def read_reply(reply: Reply, question: Question) -> Opinion:
    """The verdict in the last line of a reply that has one; nothing is guessed from anything else."""
    if reply.message is None:
        return Opinion(value=None, failure=reply.failure, timed_out=reply.timed_out)
    said = reply.message.content
    word = read_verdict(said, tuple(question.verdicts))
    if word is None:
        shown = " ".join(said.split())[-UNREAD:]
        return Opinion(value=None, failure=f"no verdict could be read from {shown!r}", unparsed=True, reasons=said)
    return Opinion(value=question.verdicts[word], reasons=said)


def read_verdict(text: str, words: Sequence[str]) -> str | None:
    """The word in the last line of a text if that line is `Verdict: WORD` and nothing else; case and bold aside."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = LAST_LINE.fullmatch(lines[-1]) if lines else None
    return next((word for word in words if found is not None and word.lower() == found[1].lower()), None)


def _thinking(question: Question) -> tuple[Message, ...]:
    words = ", ".join(question.verdicts)
    text = f"{question.text}\n\n{REASONS} You will be asked for a verdict (one of: {words}) after that."
    return (Message(role="user", content=text),)


def _mean_verdict(chances: Sequence[float] | None, question: Question) -> Opinion:
    if chances is None:
        return Opinion(value=None, failure="the question does not fit the judge's context or template")
    mean = sum(p * value for p, value in zip(chances, question.verdicts.values(), strict=True))
    if not isfinite(mean):
        return Opinion(value=None, failure=f"the judge's probabilities are not finite: {chances}")
    return Opinion(value=mean)


def _majority(votes: Sequence[Opinion]) -> Opinion:
    """The mean of what could be read, if that is more than half of the votes; else the first failure."""
    values = [vote.value for vote in votes if vote.value is not None]
    reasons = next((vote.reasons for vote in votes if vote.value is not None), "")
    if 2 * len(values) > len(votes):
        return Opinion(value=fmean(values), reasons=reasons)
    return next(vote for vote in votes if vote.value is None)
