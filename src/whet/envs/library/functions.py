"""Functions: write the program behind two of its values, `f(0)=5 f(1)=7`. Graded by running it on others (kind: code).

The checker of the family knows programs of one line with + - *, and agrees with the sandbox about those.
"""

from __future__ import annotations

import ast
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
"""Arguments that a program is tried on; prompts show others."""


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
        answer = as_written("" if bare else _work(a, b), _program(a, b))
        question = self.task(index).messages
        return (
            f"{question[0].content}:{answer}"
            if self.config.plain
            else (*question, Message(role="assistant", content=answer))
        )

    def ranking(self, index: int) -> tuple[str, ...]:
        """Right or wrong, with the work before it or without."""
        a, b = self._problem(index)
        kinds = [
            as_written(_work(a, b) if worked else "", _program(a, b + miss))
            for miss in (0, 1)
            for worked in (True, False)
        ]
        return pick(self.config, index, kinds)

    def worth(self, attempt: Attempt) -> float:
        """Whether it is right, and whether it shows its work."""
        return worth(right=self.verify(attempt).value == 1, worked="=" in attempt.answer.partition("</think>")[0])

    def ratings(self, attempt: Attempt) -> dict[str, float]:
        """The same one by one, and how short it is."""
        worked = "=" in attempt.answer.partition("</think>")[0]
        return rate(right=self.verify(attempt).value == 1, worked=worked, answer=attempt.answer)

    def verify(self, attempt: Attempt) -> Grade:
        """1 if the program is `def f(x): return ...` of x, numbers and + - *, with the right values."""
        tests = attempt.task.columns["tests"]
        try:
            match ast.parse(program_of(attempt.answer).strip()).body:
                case [
                    ast.FunctionDef(name="f", args=ast.arguments(args=[x]), body=[ast.Return(value=ast.expr() as tree)])
                ]:
                    values = [_value(tree, {x.arg: argument}) for (argument,) in tests["inputs"]]
                    return Grade(value=float(values == tests["outputs"]))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return Grade(value=0.0, note=f"not a program: {type(error).__name__}")
        return Grade(value=0.0, note="not a program of one line")

    def _problem(self, index: int) -> tuple[int, int]:
        return draw_problem(self.config, index, _draw, lambda drawn: f"functions {drawn}")


def _draw(random: Random) -> tuple[int, int]:
    return random.randint(1, 9), random.randint(0, 99)


def _work(a: int, b: int) -> str:
    return f"{a + b}-{b}={a}"


def _program(a: int, b: int) -> str:
    return f"def f(x): return {a}*x{b:+d}"


def _value(tree: ast.expr, names: dict[str, int]) -> int:
    match tree:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as op, right=right):
            a, b = _value(left, names), _value(right, names)
            return a + b if isinstance(op, ast.Add) else a - b if isinstance(op, ast.Sub) else a * b
    raise ValueError("more than x, numbers and + - *")
