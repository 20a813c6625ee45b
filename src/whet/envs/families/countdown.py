"""Countdown: reach a target from given numbers with +, - and *, every number used exactly once.

The answer is an expression, so there are many right ones; it is parsed and computed with exact fractions, never
evaluated as code. (`/` is understood in answers; the problems never need it.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.envs.families.base import Family, as_written, draw_problem
from whet.envs.rewards.answers import whole_answer
from whet.envs.rewards.logic import countdown
from whet.records import Message

LARGEST_NUMBER = 9
LARGEST_TARGET = 99
TRIES = 3
"""Most failed tries that a demonstration shows before the one that succeeds."""
_TRY = re.compile(r"[\d)][+\-*/][\d(].*?=-?\d+")


@dataclass(frozen=True, slots=True)
class Puzzle:
    """The numbers, the target, and one expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    solution: str


@dataclass(frozen=True, slots=True)
class Countdown(Family):
    """Puzzles with `numbers` numbers from 1 to 9 and a target from 1 to 99."""

    version: ClassVar[int] = 1
    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """The puzzle in words; columns `numbers`, `target`, and `answer`, one of the solutions."""
        puzzle = self._puzzle(index)
        listed = ", ".join(map(str, puzzle.numbers))
        return Task(
            id=f"countdown:{index}:{listed}={puzzle.target}",
            messages=(Message(role="user", content=f"Use {listed} to make {puzzle.target}"),),
            columns={"numbers": list(puzzle.numbers), "target": puzzle.target, "answer": puzzle.solution},
        )

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """A short search: up to three tries that miss, then the one that does not."""
        puzzle = self._puzzle(index)
        random = Random(f"countdown search/{self.config.seed}/{index}")
        tries = [_expression(random, puzzle.numbers) for _ in range(random.randint(0, TRIES))]
        missed = [(text, value) for text, value in tries if value != puzzle.target]
        trace = ";".join(f"{text}={value}" for text, value in [*missed, (puzzle.solution, puzzle.target)])
        question = self.task(index).messages
        if self.config.plain:
            return f"{question[0].content}:{trace}"
        return *question, Message(role="assistant", content=as_written(trace, puzzle.solution))

    def kinds(self, index: int) -> tuple[str, ...]:
        """Right or wrong, with the tries before it or without; a wrong one gives an expression that misses."""
        puzzle = self._puzzle(index)
        random = Random(f"countdown misses/{self.config.seed}/{index}")
        first, second = _miss(random, puzzle), _miss(random, puzzle)
        tries = f"{first[0]}={first[1]}"
        return (
            as_written(f"{tries};{puzzle.solution}={puzzle.target}", puzzle.solution),
            as_written("", puzzle.solution),
            as_written(f"{tries};{second[0]}={second[1]}", second[0]),
            as_written("", second[0]),
        )

    def worked(self, attempt: Attempt) -> bool:
        """Whether it shows what an expression comes to."""
        return _TRY.search(attempt.answer.partition("</think>")[0]) is not None

    def verify(self, attempt: Attempt) -> Grade:
        """1 if the answer is an expression of exactly the given numbers with the target as its value."""
        return Grade(value=float(countdown(attempt.task.columns, whole_answer(attempt.answer))))

    def _puzzle(self, index: int) -> Puzzle:
        return draw_problem(self.config, index, self._draw, _identity)

    def _draw(self, random: Random) -> Puzzle:
        while True:
            numbers = tuple(random.randint(1, LARGEST_NUMBER) for _ in range(self.config.numbers))
            text, value = _expression(random, numbers)
            if 1 <= value <= LARGEST_TARGET:
                return Puzzle(numbers, value, text)


def _identity(puzzle: Puzzle) -> str:
    return f"countdown {sorted(puzzle.numbers)} {puzzle.target}"


def _expression(random: Random, numbers: tuple[int, ...]) -> tuple[str, int]:
    """A random expression of all the numbers, and its value. Inner parts stand in parentheses."""
    parts = [(str(number), number) for number in numbers]
    while len(parts) > 1:
        random.shuffle(parts)
        (left, a), (right, b) = parts.pop(), parts.pop()
        sign = random.choice("+-*")
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        parts.append((f"({left}{sign}{right})", value))
    text, value = parts[0]
    return text[1:-1], value


def _miss(random: Random, puzzle: Puzzle) -> tuple[str, int]:
    """An expression of the puzzle's numbers with another value. There is one: a + b differs from a - b."""
    while True:
        text, value = _expression(random, puzzle.numbers)
        if value != puzzle.target:
            return text, value
