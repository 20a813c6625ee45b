"""A judge: how good is one answer, or which of two is better, asked so that position and persuasion do not decide.

Pairs are asked in both orders. With p1 the first answer's chance when it stands first and p2 the second answer's when
that stands first, the preference is (p1 + 1 - p2) / 2 (RLAIF, 2309.00267), or a tie where the orders disagree. A judge
that always prefers the first place then has no preference at all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from whet.config.judge import JudgeConfig, JudgeWording
from whet.envs.clients import ChatClient
from whet.envs.judges.ask import Opinion, Question, Reader
from whet.envs.judges.fence import DATA, fenced, mark_of, steering
from whet.envs.rewards.answers import after_thinking
from whet.errors import ConfigError
from whet.records import Message, seed_of

FIRST, SECOND, TIE = "A", "B", "tie"
PAIR: Mapping[str, float] = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A conversation and one answer to it."""

    asked: tuple[Message, ...]
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """How likely it is that the first of two answers is the better one. `chance is None`: no judgement was had."""

    chance: float | None
    failure: str = ""
    timed_out: bool = False
    unparsed: bool = False
    flipped: bool = False
    """Whether the two orders disagreed about which is better."""
    principle: str = ""
    """What it was judged by."""
    reasons: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How a judge is asked."""

    criteria: str
    principles: tuple[str, ...] = ()
    verdicts: Mapping[str, float]
    """Of single answers: word to value in [0, 1]."""
    everything: bool = False
    """Whether the judge sees the thinking, too."""

    def single(self, exchange: Exchange) -> Question:
        """The question about one answer."""
        parts = {"Conversation": as_text(exchange.asked), "Answer": self.shown(exchange.answer)}
        words = list(self.verdicts)
        best = f"The verdict is one of {words[0]} (worst) to {words[-1]} (best)."
        return Question(text=self._text(parts, exchange.asked, best), verdicts=self.verdicts)

    def pair(self, asked: tuple[Message, ...], answers: tuple[str, str]) -> Question:
        """The question about two answers in this order."""
        first, second = map(self.shown, answers)
        parts = {"Conversation": as_text(asked), f"Answer {FIRST}": first, f"Answer {SECOND}": second}
        which = f"The verdict is the better answer, {FIRST} or {SECOND}, or {TIE}. Their order means nothing."
        return Question(text=self._text(parts, asked, which), verdicts=PAIR)

    def same(self, asked: tuple[Message, ...], answers: tuple[str, str]) -> Question:
        """The question whether two answers say the same."""
        parts = {"Conversation": as_text(asked), **{f"Answer {n}": text for n, text in enumerate(answers, start=1)}}
        which = "The verdict is Yes if both say the same, so that one is right where the other is; else it is No."
        return Question(text=self._text(parts, asked, which), verdicts=verdicts_of("yes_no"))

    def principle(self, asked: Sequence[Message]) -> str:
        """What answers to this conversation are judged by: the same for all of them, so that they compare."""
        if not self.principles:
            return self.criteria
        return random.Random(seed_of("principle", as_text(asked))).choice(self.principles)

    def shown(self, answer: str) -> str:
        """What the judge sees of an answer."""
        return answer if self.everything else after_thinking(answer).strip()

    def steers(self, answer: str) -> bool:
        """Whether an answer tries to decide its own verdict."""
        return bool(steering(self.shown(answer)))

    def _text(self, parts: Mapping[str, str], asked: Sequence[Message], which: str) -> str:
        mark = mark_of(*parts.values())
        blocks = "\n\n".join(fenced(title, text, mark) for title, text in parts.items())
        return f"{self.principle(asked)}\n{DATA.format(mark=mark)}\n\n{blocks}\n\n{which}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A wording and a reader to ask."""

    wording: Wording
    reader: Reader
    ties_on_disagreement: bool = False
    clamp: tuple[float, float] = (0.0, 1.0)

    def points(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """How good each answer is: 0 is the worst verdict of the scale, 1 the best."""
        return self.reader.read([self.wording.single(exchange) for exchange in exchanges])

    def prefer(self, asked: Sequence[tuple[Message, ...]], answers: Sequence[tuple[str, str]]) -> list[Preference]:
        """Which of two answers to each conversation is better, asked in both orders."""
        both = [
            self.wording.pair(messages, pair)
            for messages, (first, second) in zip(asked, answers, strict=True)
            for pair in ((first, second), (second, first))
        ]
        opinions = self.reader.read(both)
        return [
            self._preference(opinions[2 * i], opinions[2 * i + 1], self.wording.principle(messages))
            for i, messages in enumerate(asked)
        ]

    def same(self, asked: Sequence[tuple[Message, ...]], pairs: Sequence[tuple[str, str]]) -> list[Opinion]:
        """Whether the two answers of each pair say the same: the lower of its opinions in both orders."""
        both = [
            self.wording.same(messages, order)
            for messages, pair in zip(asked, pairs, strict=True)
            for order in (pair, pair[::-1])
        ]
        opinions = self.reader.read(both)
        orders = zip(opinions[::2], opinions[1::2], strict=True)
        return [min(two, key=lambda opinion: -1 if opinion.value is None else opinion.value) for two in orders]

    def close(self) -> None:
        """Close the reader."""
        self.reader.close()

    def _preference(self, straight: Opinion, swapped: Opinion, principle: str) -> Preference:
        """Both orders as one preference; without both there is none, for one alone would count its position."""
        if straight.value is None or swapped.value is None:
            lost = straight if straight.value is None else swapped
            return Preference(chance=None, failure=lost.failure, timed_out=lost.timed_out, unparsed=lost.unparsed)
        first, second = straight.value, 1 - swapped.value
        flipped = (first - 0.5) * (second - 0.5) < 0
        chance = 0.5 if flipped and self.ties_on_disagreement else (first + second) / 2
        low, high = self.clamp
        return Preference(
            chance=min(max(chance, low), high), flipped=flipped, principle=principle, reasons=straight.reasons
        )


def build_judge(config: JudgeConfig, chat: ChatClient) -> Judge:
    """The judge that a recipe describes, asking `chat`. Raises `ConfigError` where its principles cannot be read."""
    return Judge(
        wording=build_wording(config),
        reader=Reader(
            chat=chat,
            max_tokens=config.max_tokens,
            reasoning=config.reasoning,
            votes=config.votes,
            probabilities=config.read == "probabilities",
        ),
        ties_on_disagreement=config.disagreement == "tie",
        clamp=config.clamp or (0.0, 1.0),
    )


def build_wording(config: JudgeWording) -> Wording:
    """The wording that a recipe describes. Raises `ConfigError` where its principles cannot be read."""
    return Wording(
        criteria=config.criteria,
        principles=read_principles(config.principles),
        verdicts=verdicts_of(config.scale),
        everything=config.visible == "everything",
    )


def verdicts_of(scale: tuple[int, int] | str) -> dict[str, float]:
    """The words of a scale with their values, 0 for the worst and 1 for the best."""
    if isinstance(scale, str):
        return {"No": 0.0, "Yes": 1.0}
    low, high = scale
    return {str(score): (score - low) / (high - low) for score in range(low, high + 1)}


def as_text(messages: Sequence[Message]) -> str:
    """A conversation, or an answer, as plain text; a single message stands for itself."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)


def read_principles(given: Sequence[str] | Path | None) -> tuple[str, ...]:
    """Principles from a recipe's list, or from a file: a YAML list, or plain text with one a line (# comments).

    Raises `ConfigError` where the file cannot be read or holds none.
    """
    if given is None:
        return ()
    if not isinstance(given, Path):
        return _checked([line.strip() for line in given], "principles")
    try:
        text = given.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if given.suffix in (".yaml", ".yml") else text.splitlines()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"principles: {given}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise ConfigError(f"principles: {given}: must be a list of sentences")
    return _checked([line.strip() for line in found if not line.lstrip().startswith("#")], f"principles: {given}")


def _checked(lines: Sequence[str], place: str) -> tuple[str, ...]:
    kept = tuple(line for line in lines if line)
    if not kept:
        raise ConfigError(f"{place}: there is none; write one sentence a line")
    return kept
