"""Functions in words, `add 6, times 7`, to be written as programs. Graded by running them (kind: code)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.envs.families.base import Family, as_written, draw_problem
from whet.envs.rewards.code import program_of
from whet.records import Message

ARGUMENTS = (0, 7, -11, 100)
"""What a program is tried on."""
SIGNS = {"add": "+", "minus": "-", "times": "*"}


@dataclass(frozen=True, slots=True)
class Functions(Family):
    """Two or three operations on x, one after the other, with numbers from 2 to 9."""

    version: ClassVar[int] = 1
    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """The operations; column `tests` has values, as APPS writes them."""
        steps = self._problem(index)
        shown = ", ".join(f"{word} {number}" for word, number in steps)
        tests = {"fn_name": "f", "inputs": [[x] for x in ARGUMENTS], "outputs": [_value(steps, x) for x in ARGUMENTS]}
        message = Message(role="user", content=shown)
        columns = {"tests": tests, "answer": _written(steps)[-1]}
        return Task(id=f"functions:{index}:{shown}", messages=(message,), columns=columns)

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """The expression as it grows, and the program; a share of `bare` has the program alone."""
        bare = Random(f"functions bare/{self.config.seed}/{index}").random() < self.config.bare
        answer = _answer(self._problem(index), worked=not bare)
        asked = self.task(index).messages[0]
        return f"{asked.content}:{answer}" if self.config.plain else (asked, Message(role="assistant", content=answer))

    def kinds(self, index: int) -> tuple[str, ...]:
        """Right or wrong (the last number), with the work before it or without."""
        *first, (word, number) = steps = self._problem(index)
        wrong = (*first, (word, number + 1))
        return tuple(_answer(each, worked=worked) for each in (steps, wrong) for worked in (True, False))

    def worked(self, attempt: Attempt) -> bool:
        """Whether the expression is built up before the program."""
        return "x" in attempt.answer.partition("</think>")[0]

    def verify(self, attempt: Attempt) -> Grade:
        """1 for the demonstration's program; the code reward takes any that does the same."""
        return Grade(value=float(program_of(attempt.answer).strip() == attempt.task.columns["answer"]))

    def _problem(self, index: int) -> _Steps:
        return draw_problem(self.config, index, _draw, lambda steps: f"functions {steps}")


_Steps = tuple[tuple[str, int], ...]


def _draw(random: Random) -> _Steps:
    """No two operations that follow each other are of one kind: their order would not matter."""
    words = random.choice([("add", "times"), ("times", "minus"), ("minus", "times", "add"), ("times", "add", "times")])
    return tuple((word, random.randint(2, 9)) for word in words)


def _value(steps: _Steps, x: int) -> int:
    for word, number in steps:
        x = x + number if word == "add" else x - number if word == "minus" else x * number
    return x


def _written(steps: _Steps) -> list[str]:
    """The expression after each operation, and the program."""
    grown = ["x"]
    for word, number in steps:
        inner = f"({grown[-1]})" if word == "times" and len(grown) > 1 else grown[-1]
        grown.append(f"{inner}{SIGNS[word]}{number}")
    return [*grown[1:], f"def f(x): return {grown[-1]}"]


def _answer(steps: _Steps, *, worked: bool) -> str:
    *work, program = _written(steps)
    return as_written(";".join(work) if worked else "", program)
