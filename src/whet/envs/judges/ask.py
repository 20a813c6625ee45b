"""One question to a judge with a few possible verdicts, and the verdict parsed from its reply: strictly, or not at all.

What a judge writes must end with the line `Verdict: X`, X being one of the words that were offered; whatever else
comes is no verdict, never a guess. Or a model is asked itself how likely each word is as its whole answer, and the mean
counts (GenRM, 2408.15240; d-RLAIF, 2309.00267).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import fmean

from whet.envs.clients import ChatClient
from whet.records import Message, Reply

LAST_LINE = re.compile(r"[\s*_`]*verdict\s*:[\s*_`]*([^\s*_`.]+)[\s*_`.]*", re.IGNORECASE)
VERDICT = "Answer with the one line `Verdict: X`, where X is one of: {words}."
REASONS = "First give your reasons in a few sentences."
REASONS_FIRST = f"{REASONS} Your last line must then be `Verdict: X`, where X is one of: {{words}}."
REASONS_ALONE = f"{REASONS} You will be asked for a verdict (one of: {{words}}) after that."
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Asks each question `votes` times; the mean verdict counts, where more than half of them could be had."""

    chat: ChatClient
    max_tokens: int
    reasoning: bool = False
    """Whether reasons come before the verdict."""
    votes: int = 1
    probabilities: bool = False
    """Whether a verdict is the mean under the model's own probabilities; else it is what the judge writes."""

    def read(self, questions: Sequence[Question]) -> list[Opinion]:
        """One opinion on each question, in order."""
        asked = [question for question in questions for _ in range(self.votes)]
        opinions = self._expected(asked) if self.probabilities else self._written(asked)
        return [_majority(opinions[first : first + self.votes]) for first in range(0, len(asked), self.votes)]

    def close(self) -> None:
        """Close the client."""
        self.chat.close()

    def _written(self, questions: Sequence[Question]) -> list[Opinion]:
        asked = [conversation(question, reasoning=self.reasoning) for question in questions]
        replies = self.chat.chat(
            asked,
            max_tokens=self.max_tokens,
            readable=lambda index, reply: reply.cut_off or not read_reply(reply, questions[index]).unparsed,
        )
        return [read_reply(reply, question) for reply, question in zip(replies, questions, strict=True)]

    def _expected(self, questions: Sequence[Question]) -> list[Opinion]:
        """Without reasons, or after them (GenRM-CoT): a question without reasons gets no opinion."""
        if not self.reasoning:
            return self._mean_verdicts([(_asked(question, VERDICT),) for question in questions], questions)
        asked = [_asked(question, REASONS_ALONE) for question in questions]
        replies = self.chat.chat([(message,) for message in asked], max_tokens=self.max_tokens)
        opinions = [Opinion(value=None, failure=reply.failure, timed_out=reply.timed_out) for reply in replies]
        reasons = {i: reply.message for i, reply in enumerate(replies) if reply.message is not None}
        reasoned = [(asked[i], said, _user(_demand(questions[i], VERDICT))) for i, said in reasons.items()]
        found = self._mean_verdicts(reasoned, [questions[i] for i in reasons])
        for (i, said), opinion in zip(reasons.items(), found, strict=True):
            opinions[i] = replace(opinion, reasons=said.content)
        return opinions

    def _mean_verdicts(self, asked: Sequence[Sequence[Message]], questions: Sequence[Question]) -> list[Opinion]:
        """The mean verdict of each; questions with the same words go through the model together."""
        found: dict[int, Opinion] = {}
        for words in dict.fromkeys(tuple(question.verdicts) for question in questions):
            places = [i for i, question in enumerate(questions) if tuple(question.verdicts) == words]
            answers = self.chat.probabilities([asked[i] for i in places], [f"Verdict: {word}" for word in words])
            for place, chances in zip(places, answers, strict=True):
                found[place] = _mean_verdict(chances, questions[place])
        return [found[i] for i in range(len(questions))]


def conversation(question: Question, *, reasoning: bool) -> tuple[Message, ...]:
    """The question as the judge gets it that is to write its verdict."""
    return (_asked(question, REASONS_FIRST if reasoning else VERDICT),)


def read_reply(reply: Reply, question: Question) -> Opinion:
    """The verdict in the last line of a reply that has one; nothing is guessed from anything else."""
    if reply.message is None:
        return Opinion(value=None, failure=reply.failure, timed_out=reply.timed_out)
    said = reply.message.content
    if reply.cut_off:  # "Verdict: 1" may be the beginning of "Verdict: 10"
        return Opinion(value=None, failure="cut off at max_tokens before its verdict was whole", unparsed=True)
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


def _asked(question: Question, how: str) -> Message:
    """The question in one user message, which every chat template can write, with what is to be answered, and how."""
    return _user(f"{question.text}\n\n{_demand(question, how)}")


def _demand(question: Question, how: str) -> str:
    return how.format(words=", ".join(question.verdicts))


def _user(text: str) -> Message:
    return Message(role="user", content=text)


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
