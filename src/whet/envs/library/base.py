"""What a task family is: problems by number, with answers of known worth.

Right with its work shown > right > wrong with work > wrong. Preferences that people state are noisy; these follow from
a score that is known, so that what a method learned from them can be told exactly.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.records import Message

OBJECTIVES = ("right", "worked", "brief")
"""What generated answers are rated by."""
LONG = 100
"""Characters of an answer that is not brief at all."""


class Family:
    """Problems by number. What index i is depends on the config and i alone, never on what was asked before."""

    __slots__ = ()
    version: ClassVar[int]
    """Raised when the same config gives other problems than before."""
    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """Problem `index`, from 0, for RL and evaluation."""
        raise NotImplementedError

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """Problem `index`, solved: a conversation for SFT, or running text where the config says `plain`."""
        raise NotImplementedError

    def verify(self, attempt: Attempt) -> Grade:
        """1 for a right answer to one of its tasks, 0 for any other."""
        raise NotImplementedError

    def worked(self, attempt: Attempt) -> bool:
        """Whether an answer shows its work."""
        raise NotImplementedError

    def kinds(self, index: int) -> tuple[str, ...]:
        """Four answers to problem `index`, each worth less than the one before it."""
        raise NotImplementedError

    def ranking(self, index: int) -> tuple[str, ...]:
        """`config.answers` of the four kinds, in that order; which ones depends on the index alone."""
        kinds, random = self.kinds(index), Random(f"{self.config.generate} ranking/{self.config.seed}/{index}")
        return tuple(kinds[place] for place in sorted(random.sample(range(len(kinds)), self.config.answers)))

    def worth(self, attempt: Attempt) -> float:
        """(2 right + worked) / 3: being right counts for more than showing the work."""
        return (2 * (self.verify(attempt).value == 1) + self.worked(attempt)) / 3

    def ratings(self, attempt: Attempt) -> dict[str, float]:
        """The answer by each of the `OBJECTIVES`, from 0 to 1, each on its own."""
        right, worked = self.verify(attempt).value == 1, self.worked(attempt)
        return {"right": float(right), "worked": float(worked), "brief": max(0.0, 1 - len(attempt.answer) / LONG)}


def as_written(work: str, answer: object) -> str:
    """An answer in the demonstrations' form."""
    return f"<think>{work}</think><answer>{answer}</answer>"
