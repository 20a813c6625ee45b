"""What a task family is: problems by number, with answers of known worth.

Right with its work shown > right > wrong with work > wrong. Preferences that people state are noisy; these follow from
a score that is known, so that what a method learned from them can be told exactly. Held-out problems are chosen by a
hash of the problem itself, so no seed and no count can mix the two halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import ClassVar, TypeVar, overload

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.records import Message

OBJECTIVES = ("right", "worked", "brief")
"""What generated answers are rated by."""
LONG = 100
"""Characters of an answer that is not brief at all."""


class Family(Sequence[Task]):
    """Problems by number. What index i is depends on the config and i alone, never on what was asked before.

    As a sequence it is the config's tasks, each made whenever it is asked for.
    """

    __slots__ = ()
    version: ClassVar[int]
    """Raised when the same config gives other problems than before."""
    checks_steps: ClassVar[bool] = False
    """Whether there is `check_steps`."""
    config: GeneratedConfig

    def __len__(self) -> int:
        return self.config.count

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        places = range(len(self))[index]
        return self.task(places) if isinstance(places, int) else [self.task(place) for place in places]

    def task(self, index: int) -> Task:
        """Problem `index`, from 0, for RL and evaluation."""
        raise NotImplementedError

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """Problem `index`, solved: a conversation for SFT, or running text where the config says `plain`."""
        raise NotImplementedError

    def verify(self, attempt: Attempt) -> Grade:
        """1 for a right answer to one of its tasks, 0 for any other."""
        raise NotImplementedError

    def check_steps(self, attempt: Attempt) -> Grade:
        """A grade without a value, with one step score for each written step of an answer."""
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

    def rate(self, attempt: Attempt) -> Grade:
        """The worth as a grade, the ratings as its metrics."""
        return Grade(value=self.worth(attempt), metrics=self.ratings(attempt))


def as_written(work: str, answer: object) -> str:
    """An answer in the demonstrations' form."""
    return f"<think>{work}</think><answer>{answer}</answer>"


HELD_OUT = 10
"""One problem in so many is held out."""
DRAWS = 10_000
"""Most redraws for one problem; a problem space that has none of the wanted half is our mistake."""

Problem = TypeVar("Problem")


def draw_problem(
    config: GeneratedConfig, index: int, draw: Callable[[Random], Problem], identity: Callable[[Problem], str]
) -> Problem:
    """Problem `index` of the config's half: drawn anew until its identity falls into that half.

    `identity` must be the same for problems that are the same but for their writing, such as 3+5 and 5+3.
    """
    random = Random(f"{config.generate}/{config.seed}/{config.split}/{index}")
    for _ in range(DRAWS):
        problem = draw(random)
        if held_out(identity(problem)) == (config.split == "test"):
            return problem
    raise AssertionError(f"{config.generate} has no problem for split {config.split}")


def held_out(identity: str) -> bool:
    """Whether the problem belongs to the test half, everywhere and always."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % HELD_OUT == 0
