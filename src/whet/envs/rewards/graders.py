"""OpenAI's grader objects as rewards: templates over the row (`item`) and the answer (`sample`), and their values."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whet.config.graders import Grader, MultiGrader, PythonGrader, ScoreModel, StringCheck, TextSimilarity
from whet.envs.base import Attempt, Grade, Separate, Task
from whet.envs.clients import ChatClient
from whet.errors import DataError, GraderError, boundary
from whet.records import Message, Reply
from whet.sandbox.workers import WorkerPool

LONGEST = 20_000
"""Characters of a text that is compared; what follows is left out."""
_FIELD = re.compile(r"\{\{\s*(item|sample)\.([\w.]+)\s*\}\}")
_RESULT = re.compile(r'"result"\s*:\s*"?(-?\d+(?:\.\d+)?)"?\s*\}[\s`]*\Z')
_OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "like": lambda given, reference: reference in given,
    "ilike": lambda given, reference: reference.lower() in given.lower(),
}
_CALLS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil, "exp": math.exp, "sqrt": math.sqrt,
    "log": math.log,
}  # fmt: skip
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


class GraderReward(Separate):
    """The value of a grader object for each attempt; `deadline_s` is for one call of its Python.

    `model` is asked by graders of type `score_model`, `max_tokens` long; where it has no number, or is not there, the
    attempt is unscored: that says nothing about the answer.
    """

    def __init__(
        self,
        *,
        name: str,
        weight: float,
        grader: Grader,
        deadline_s: float,
        judges: bool,
        model: ChatClient | None = None,
        max_tokens: int = 1024,
    ) -> None:
        self.name, self.weight, self.judges, self._grader = name, weight, judges, grader
        self._model, self._max_tokens = model, max_tokens
        self.controlled = model is not None  # a missing reply of the grading model is not the answer's fault
        parts = grader.graders if isinstance(grader, MultiGrader) else {"": grader}
        self._parts = parts
        self._pools = {
            key: WorkerPool(
                "whet.envs.rewards.function_worker:load_source", arguments=[g.source], deadline_s=deadline_s
            )
            for key, g in parts.items()
            if isinstance(g, PythonGrader)
        }

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """The grader's value for each attempt."""
        replies: list[dict[str, Reply]] = [{} for _ in attempts]
        for key, part in self._parts.items():
            if isinstance(part, ScoreModel) and self._model is not None:
                asked = [conversation(part, attempt) for attempt in attempts]
                for found, reply in zip(replies, self._model.chat(asked, max_tokens=self._max_tokens), strict=True):
                    found[key] = reply
        return [self._grade(attempt, found) for attempt, found in zip(attempts, replies, strict=True)]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task without a column that a template names."""
        for task in tasks:
            for part in self._parts.values():
                nothing = Attempt(task=task, messages=())
                if isinstance(part, ScoreModel):
                    conversation(part, nothing)
                elif not isinstance(part, PythonGrader):
                    for template in (part.input, part.reference):
                        fill(template, nothing)

    def close(self) -> None:
        """Kill the processes of Python graders, and close the model's client."""
        if self._model is not None:
            self._model.close()
        for pool in self._pools.values():
            pool.close()

    def _grade(self, attempt: Attempt, replies: Mapping[str, Reply]) -> Grade:
        values: dict[str, float] = {}
        try:
            with boundary(GraderError, "the grader failed"):
                for key, part in self._parts.items():
                    if isinstance(part, ScoreModel):
                        values[key] = scored(replies[key], part)
                    else:
                        values[key] = self._value(key, part, attempt)
                if isinstance(self._grader, MultiGrader):
                    total = calculate(self._grader.calculate_output, values)
                    return Grade(value=total, metrics=values) if math.isfinite(total) else _failed(f"gives {total}")
        except (GraderError, DataError) as error:
            return _failed(str(error))
        return Grade(value=values[""])

    def _value(self, key: str, part: StringCheck | TextSimilarity | PythonGrader, attempt: Attempt) -> float:
        if isinstance(part, PythonGrader):
            asked = {"sample": _sample(attempt), "item": dict(attempt.task.columns)}
            result = self._pools[key].map([asked])[0]
            if result.failure is not None:
                raise GraderError(result.failure.message)
            assert isinstance(result.value, float), "the worker checks it"
            return result.value
        given, reference = fill(part.input, attempt), fill(part.reference, attempt)
        if isinstance(part, StringCheck):
            return float(_OPERATIONS[part.operation](given, reference))
        return similarity(given[:LONGEST], reference[:LONGEST], part.evaluation_metric)


def conversation(part: ScoreModel, attempt: Attempt) -> tuple[Message, ...]:
    """What a model is asked, and how it is to answer, which OpenAI's service adds as a schema."""
    texts = [each.content if isinstance(each.content, str) else each.content.text for each in part.input]
    low, high = part.range
    texts[-1] += f'\n\nEnd with one line of JSON, {{"result": X}}, where X is a number from {low:g} to {high:g}.'
    roles: list[Any] = ["system" if each.role == "developer" else each.role for each in part.input]
    return tuple(Message(role=role, content=fill(text, attempt)) for role, text in zip(roles, texts, strict=True))


def scored(reply: Reply, part: ScoreModel) -> float:
    """The `"result": X}` that a reply ends with. Raises `GraderError` where there is none, or none in the range."""
    if reply.message is None or reply.cut_off:
        raise GraderError(reply.failure or f"{part.model} was cut off at max_tokens")
    found = _RESULT.search(reply.message.content)
    if found is None or not part.range[0] <= float(found[1]) <= part.range[1]:
        raise GraderError(f"no result from {part.range[0]:g} to {part.range[1]:g} in {reply.message.content[-80:]!r}")
    return float(found[1])


def _sample(attempt: Attempt) -> dict[str, Any]:
    return {"output_text": attempt.answer, "choices": [{"message": {"content": attempt.answer}}]}


def fill(template: str, attempt: Attempt) -> str:
    """The template with its fields filled in. Raises `DataError` for a field that the row does not have."""
    values = {"item": attempt.task.columns, "sample": _sample(attempt)}

    def field(found: re.Match[str]) -> str:
        value: Any = values[found[1]]
        for name in found[2].split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise DataError(f"task {attempt.task.id}: the grader names {found[1]}.{found[2]}, which no row has")
            value = value[name]
        return str(value)

    return _FIELD.sub(field, template)


def similarity(left: str, right: str, metric: str) -> float:
    """How alike two texts are, from 0 to 1.

    fuzzy_match: 2 LCS / (sum of lengths) of characters, LCS the longest common subsequence. rouge_n: F1 of n-grams of
    words; rouge_l: of their LCS. gleu: the smaller of precision and recall over 1- to 4-grams (Wu et al. 2016).
    """
    ours, theirs = left.lower().split(), right.lower().split()
    if metric == "fuzzy_match":
        return _f1(_common(left[:2000], right[:2000]), len(left[:2000]), len(right[:2000]))
    if metric == "rouge_l":
        return _f1(_common(ours[:2000], theirs[:2000]), len(ours[:2000]), len(theirs[:2000]))
    sizes = range(1, 5) if metric == "gleu" else [int(metric.removeprefix("rouge_"))]
    grams = [Counter(tuple(w[i : i + n]) for n in sizes for i in range(len(w) - n + 1)) for w in (ours, theirs)]
    shared, totals = (grams[0] & grams[1]).total(), [each.total() for each in grams]
    if metric == "gleu":
        return shared / max(totals) if max(totals) else 0.0
    return _f1(shared, *totals)


def calculate(expression: str, values: Mapping[str, float]) -> float:
    """The value of a checked arithmetic expression over the graders' values."""

    def of(node: Any) -> Any:
        match node:
            case ast.Constant(value=number):
                return number
            case ast.Name(id=name):
                return values[name]
            case ast.UnaryOp():
                return _OPERATORS[type(node.op)](of(node.operand))
            case ast.BinOp():
                return _OPERATORS[type(node.op)](of(node.left), of(node.right))
            case _:
                return _CALLS[node.func.id](*map(of, node.args))

    return float(of(ast.parse(expression.replace("^", "**"), mode="eval").body))


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for place, other in enumerate(right, 1):
            before, row[place] = row[place], before + 1 if one == other else max(row[place], row[place - 1])
    return row[-1]


def _f1(shared: float, left: int, right: int) -> float:
    return 2 * shared / (left + right) if left + right else 0.0


def _failed(why: str) -> Grade:
    return Grade(value=None, failure=why)
