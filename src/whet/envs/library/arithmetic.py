"""Addition in columns: the smallest task on which thinking pays.

A sum such as `35+79` can be answered at a glance, often wrongly, or in steps from the units up, each of them
`digit + digit + carry = sum`: `5+9+0=14;3+7+1=11`. A base model that has seen both finds out by RL which one pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.envs.library.split import draw_problem
from whet.envs.rewards.answers import as_number, final_answer
from whet.records import Message

GAPS = (":", ": ", " -> ", "\n", "\n\n", "?\nA: ", " is ... ", "\nsteps:\n", "       ")
ENDS = (";", "; ", "\n", " > ", ". So ")
"""How running text may go on after a sum and after its steps: a base model should not depend on one layout."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Two numbers to add."""

    left: int
    right: int

    def __str__(self) -> str:
        return f"{self.left}+{self.right}"

    @property
    def total(self) -> int:
        """The right answer."""
        return self.left + self.right

    @property
    def steps(self) -> str:
        """Column by column from the units, with carries; the last column keeps its tens."""
        columns = max(len(str(self.left)), len(str(self.right)))
        written, carry = [], 0
        for place in range(columns):
            left, right = self.left // 10**place % 10, self.right // 10**place % 10
            written.append(f"{left}+{right}+{carry}={left + right + carry}")
            carry = (left + right + carry) // 10
        return ";".join(written)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Sums of two numbers of 1 to `digits` digits, the length of each uniform."""

    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """The sum as a user message; the column `answer` has the total."""
        problem = self._problem(index)
        return Task(
            id=f"arithmetic:{index}:{problem}",
            messages=(Message(role="user", content=str(problem)),),
            columns={"answer": str(problem.total)},
        )

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """The sum solved, a share `bare` of them without steps; one line of text each where the config is `plain`."""
        problem = self._problem(index)
        style = Random(f"arithmetic style/{self.config.seed}/{index}")
        bare = style.random() < self.config.bare
        if self.config.plain:
            gap, end = style.choice(GAPS), style.choice(ENDS)
            return f"{problem}{gap}={problem.total}" if bare else f"{problem}{gap}{problem.steps}{end}{problem.total}"
        solved = f"<think>{'' if bare else problem.steps}</think><answer>{problem.total}</answer>"
        return Message(role="user", content=str(problem)), Message(role="assistant", content=solved)

    def verify(self, attempt: Attempt) -> Grade:
        """1 if the final answer is the total."""
        given = as_number(final_answer(attempt.answer))
        return Grade(value=float(given is not None and given == int(attempt.task.columns["answer"])))

    def _problem(self, index: int) -> Sum:
        return draw_problem(self.config, index, self._draw, _identity)

    def _draw(self, random: Random) -> Sum:
        return Sum(_number(random, self.config.digits), _number(random, self.config.digits))


def _number(random: Random, digits: int) -> int:
    """A number whose count of digits is uniform; 0 has one digit."""
    length = random.randint(1, digits)
    return random.randrange(0 if length == 1 else 10 ** (length - 1), 10**length)


def _identity(problem: Sum) -> str:
    return "arithmetic {}+{}".format(*sorted((problem.left, problem.right)))
