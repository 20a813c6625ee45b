"""Functions: write the program behind two of its values, `f(0)=5 f(1)=7`. Graded by running it on others (kind: code)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.envs.library.ranking import as_written, pick, rate, worth
from whet.envs.library.split import draw_problem
from whet.envs.rewards.code import program_of
from whet.records import Message

UNSEEN = (7, 11, -3, 100)
"""Arguments that a program is tried on."""
_PROGRAM = re.compile(r"def f\(x\): return (\d+)\*x\+(\d+)")


@dataclass(frozen=True, slots=True)
class Functions:
    """Lines a x + b with a from 1 to 9 and b from 0 to 99, shown at 0 and at 1."""

    version: ClassVar[int] = 1
    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """The two values; column `tests` has others, as APPS writes them."""
        a, b = self._problem(index)
        shown = f"f(0)={b} f(1)={a + b}"
        tests = {"fn_name": "f", "inputs": [[x] for x in UNSEEN], "outputs": [a * x + b for x in UNSEEN]}
        message = Message(role="user", content=shown)
        return Task(id=f"functions:{index}:{shown}", messages=(message,), columns={"tests": tests})

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """The difference and the program; a share of `bare` has the program alone."""
        a, b = self._problem(index)
        bare = Random(f"functions bare/{self.config.seed}/{index}").random() < self.config.bare
        answer = _answer(a, b, worked=not bare)
        asked = self.task(index).messages[0]
        return f"{asked.content}:{answer}" if self.config.plain else (asked, Message(role="assistant", content=answer))

    def ranking(self, index: int) -> tuple[str, ...]:
        """Right or wrong, with the difference before it or without."""
        a, b = self._problem(index)
        kinds = [_answer(a, b + miss, worked=worked) for miss in (0, 1) for worked in (True, False)]
        return pick(self.config, index, kinds)

    def worth(self, attempt: Attempt) -> float:
        """Whether it is right, and whether it shows its work."""
        return worth(right=self.verify(attempt).value == 1, worked=_worked(attempt))

    def ratings(self, attempt: Attempt) -> dict[str, float]:
        """The same one by one, and how short it is."""
        return rate(right=self.verify(attempt).value == 1, worked=_worked(attempt), answer=attempt.answer)

    def verify(self, attempt: Attempt) -> Grade:
        """1 for the right program in the demonstrations' form; the code reward takes any form."""
        found = _PROGRAM.fullmatch(program_of(attempt.answer).strip())
        values = found and [int(found[1]) * x + int(found[2]) for x in UNSEEN]
        return Grade(value=float(values == attempt.task.columns["tests"]["outputs"]))

    def _problem(self, index: int) -> tuple[int, int]:
        return draw_problem(self.config, index, _draw, lambda drawn: f"functions {drawn}")


def _draw(random: Random) -> tuple[int, int]:
    return random.randint(1, 9), random.randint(0, 99)


def _answer(a: int, b: int, *, worked: bool) -> str:
    return as_written(f"{a + b}-{b}={a}" if worked else "", f"def f(x): return {a}*x+{b}")


def _worked(attempt: Attempt) -> bool:
    return "=" in attempt.answer.partition("</think>")[0]
