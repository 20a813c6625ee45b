"""Reward models as rewards: of answers, of steps, and ensembles.

A model reads messages, not tokens, so policy and reward model need not have the same tokenizer. What it could not
read in time is a failed grade and never a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import pstdev

from whet.envs.base import Attempt, Grade, OfAnyTask
from whet.envs.clients import Passage, RewardModelClient, ScoreReading
from whet.formulas.aggregate import STEPS
from whet.records import Message, StepScore

BATCH = 64
"""Answers scored between two checks of the deadline."""
LATE = Grade(value=None, failure="the reward model did not come to it before its deadline", timed_out=True)

Combine = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReward(OfAnyTask):
    """The score of the whole answer; of several models, what `combine` makes of theirs."""

    scorers: tuple[RewardModelClient, ...]
    combine: Combine
    truncated: float | None
    """Value of an answer that was cut off; None: its score."""
    deadline_s: float

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt."""
        ends_of = [(len(attempt.answer),) for attempt in attempts]
        read = read_all(self.scorers, attempts, ends_of, self.deadline_s)
        return [self._grade(attempt, found) for attempt, found in zip(attempts, read, strict=True)]

    def _grade(self, attempt: Attempt, read: Sequence[ScoreReading] | None) -> Grade:
        if read is None:
            return LATE
        failed = next((reading.failure for reading in read if reading.failure), "")
        if failed:
            return Grade(value=None, failure=failed)
        scores = [reading.scores[0] for reading in read]
        metrics: Mapping[str, float] = {"spread": pstdev(scores)} if len(scores) > 1 else read[0].parts
        if attempt.truncated and self.truncated is not None:
            return Grade(value=self.truncated, metrics=metrics)
        return Grade(value=self.combine(scores), metrics=metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReward(OfAnyTask):
    """The probability that each step is right, and of the answer what `aggregate` makes of them."""

    scorer: RewardModelClient
    separator: str
    aggregate: str
    deadline_s: float

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt."""
        ends_of = [tuple(accumulate(map(len, split_steps(a.answer, self.separator)))) for a in attempts]
        read = read_all((self.scorer,), attempts, ends_of, self.deadline_s)
        return [self._grade(ends, found) for ends, found in zip(ends_of, read, strict=True)]

    def _grade(self, ends: Sequence[int], read: Sequence[ScoreReading] | None) -> Grade:
        if read is None:
            return LATE
        (reading,) = read
        if reading.failure:
            return Grade(value=None, failure=reading.failure)
        return Grade(
            value=STEPS[self.aggregate](reading.scores),
            metrics={"steps": float(len(ends))},
            # An empty answer is one step without characters: it has a value, and no place for a grade.
            steps=tuple(StepScore(end=end, value=s) for end, s in zip(ends, reading.scores, strict=True) if end),
        )


def split_steps(answer: str, separator: str) -> list[str]:
    """The answer in steps, separators included, so that joined they are the answer again; white space is no step."""
    pieces = answer.split(separator)
    steps = [piece + separator for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])
    joined: list[str] = []
    waiting = ""
    for step in steps:
        waiting += step
        if waiting.replace(separator, "").strip():
            joined.append(waiting)
            waiting = ""
    if waiting and joined:
        joined[-1] += waiting
        return joined
    return joined or [answer]


def read_all(
    scorers: Sequence[RewardModelClient],
    attempts: Sequence[Attempt],
    ends_of: Sequence[tuple[int, ...]],
    deadline_s: float,
) -> Iterator[tuple[ScoreReading, ...] | None]:
    """For each attempt every scorer's reading of its last answer; None for those that the clock left out."""
    until = time.monotonic() + deadline_s
    passages = [
        Passage(messages=_up_to_answer(attempt), ends=ends) for attempt, ends in zip(attempts, ends_of, strict=True)
    ]
    for first in range(0, len(passages), BATCH):
        batch = passages[first : first + BATCH]
        if time.monotonic() > until:
            yield from (None for _ in batch)
        else:
            yield from zip(*(scorer.read(batch) for scorer in scorers), strict=True)


def _up_to_answer(attempt: Attempt) -> tuple[Message, ...]:
    """The conversation up to the policy's last message; what was observed after it is not judged."""
    last = max(place for place, message in enumerate(attempt.messages) if message.role == "assistant")
    return (*attempt.task.messages, *attempt.messages[: last + 1])
