r"""Whether the final answer is the gold one: by rule where that is plain, else with computer algebra in a worker.

The gold is read once into a typed value (`values`), when the tasks are checked; its type decides which rules compare it
(`agree`). Algebra may take for ever, or until memory ends, so it runs in processes that are killed at a deadline.

Whose fault a grade without a verdict is, a control job decides: the gold answered with itself, beside it. Where the
control passes, the answer was what no grader finishes, and it is wrong (`Grade.gave_up`); else the machinery failed,
and the attempt is unscored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from whet.envs.base import Attempt, Grade, Separate, Task, graded, require
from whet.envs.rewards.agree import NO_ALGEBRA, Undecided
from whet.envs.rewards.answers import gold_answer
from whet.envs.rewards.reader import read
from whet.envs.rewards.reading import answers, final_words
from whet.envs.rewards.values import LONGEST, Date, Text, Value, YesNo
from whet.errors import DataError
from whet.sandbox.base import JSON, Failure, FailureKind, Result
from whet.sandbox.workers import WorkerPool

MEMORY_MB = 2048
RIGHT = Grade(value=1.0)


@dataclass(frozen=True, slots=True)
class _Question:
    """What a worker is asked where no rule decides. Equal ones are asked once."""

    gold: str
    answer: str
    question: str
    marked: bool

    def payload(self, tolerance: float) -> dict[str, JSON]:
        return {**{name: getattr(self, name) for name in self.__slots__}, "tolerance": tolerance}

    def grade(self, result: Result) -> Grade:
        """A worker's verdict."""
        return graded(bool(result.value), self.answer, self.gold)


class MathReward(Separate):
    r"""1 if the final answer equals the gold one, else 0. `gold` names the column.

    `words` allows golds that are no mathematics (names, dates, yes or no) and lists of golds, any of which counts.
    `tolerance` is relative, of numbers. `check` refuses golds that no answer can meet, and without `words` those that
    are words.
    """

    judges = controlled = True

    def __init__(
        self,
        *,
        name: str,
        weight: float,
        gold: str,
        deadline_s: float,
        words: bool = False,
        tolerance: float = 0.0,
        workers: int | None = None,
    ) -> None:
        self.name, self.weight, self._gold, self._words, self._tolerance = name, weight, gold, words, tolerance
        self._pool = WorkerPool(
            "whet.envs.rewards.algebra:load",
            workers=workers or os.cpu_count() or 1,
            deadline_s=deadline_s,
            memory_mb=MEMORY_MB,
            forked=True,
        )

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt; the workers only see what no rule decides."""
        judged = [self._by_rule(attempt) for attempt in attempts]
        questions = list(dict.fromkeys(q for item in judged if not isinstance(item, Grade) for q in item))
        results = self._pool.map([question.payload(self._tolerance) for question in questions])
        grades = dict(zip(questions, self._attributed(questions, results), strict=True))
        return [item if isinstance(item, Grade) else _best([grades[q] for q in item]) for item in judged]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task whose gold answer is missing or cannot be met."""
        unsure: dict[str, Task] = {}
        for task in tasks:
            for gold in self._golds(task):
                if isinstance(_read(gold), Text | Date | YesNo) and not self._words:
                    raise self._unmet(task, gold, "is text, not mathematics; use kind: answer or exact")
                if gold.count("{") != gold.count("}"):
                    raise self._unmet(task, gold, "has braces that do not close")
                if not _meets_itself(gold):
                    unsure.setdefault(gold, task)
        asked = [_Question(gold=gold, answer=gold, question="", marked=True).payload(0.0) for gold in unsure]
        for (gold, task), result in zip(unsure.items(), self._pool.map(asked), strict=True):
            if result.value != 1:
                why = "cannot be read as mathematics" if result.failure is None else result.failure.message
                raise self._unmet(task, gold, why)

    def in_words(self, attempt: Attempt) -> list[tuple[str, str]]:
        """Each gold with the answer to it, where all golds are words, which rules cannot tell from others like them."""
        golds, (given, _) = self._golds(attempt.task), final_words(attempt.answer)
        prose = bool(given) and len(given) <= LONGEST and all(isinstance(_read(gold), Text) for gold in golds)
        return [(gold, given) for gold in golds] if prose else []

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def _unmet(self, task: Task, gold: str, why: str) -> DataError:
        return DataError(f"task {task.id}: gold answer {gold[:80]!r} in column {self._gold!r}: {why}")

    def _golds(self, task: Task) -> list[str]:
        """The accepted answers of a task, as texts. Raises `DataError` where there is none or it has no text."""
        value = require(task, self._gold, self.name)
        listed = list(value) if self._words and isinstance(value, list | tuple) else [_listed(value)]
        texts = []
        for each in listed:
            if not isinstance(each, str | int | float):
                raise self._unmet(task, repr(each), f"is a {type(each).__name__}; a gold answer is a text or a number")
            text = gold_answer(each)
            if not any(character.isalnum() for character in text):
                raise self._unmet(task, str(each), "is empty" if not text else "has no letter and no digit")
            texts.append(text)
        if not texts:
            raise self._unmet(task, "[]", "is an empty list")
        return texts

    def _by_rule(self, attempt: Attempt) -> Grade | list[_Question]:
        """The grade where it needs no algebra, else what to ask of a worker for each gold."""
        try:
            golds = self._golds(attempt.task)
        except DataError as error:
            return Grade(value=None, failure=str(error))
        given, marked = final_words(attempt.answer)
        if not given:
            return Grade(value=0.0, note="no answer found")
        if len(given) > LONGEST:
            return Grade(value=0.0, note=f"the answer has more than {LONGEST} characters")
        question = attempt.task.messages[-1].content if attempt.task.messages else ""
        open_questions: list[_Question] = []
        for gold in golds:
            value = _read(gold)
            try:
                if answers(value, gold, given, NO_ALGEBRA, question, marked=marked, tolerance=self._tolerance):
                    return RIGHT
            except Undecided:
                open_questions.append(_Question(gold=gold, answer=given, question=question, marked=marked))
        return open_questions or graded(False, given, " or ".join(golds))

    def _attributed(self, questions: Sequence[_Question], results: Sequence[Result]) -> list[Grade]:
        """Verdicts, and for what has none whose fault that is.

        A worker that died is asked once more; a late one is not. Both count against the answer if a control passes.
        """
        failed = [place for place, result in enumerate(results) if result.failure is not None]
        if not failed:
            return [question.grade(result) for question, result in zip(questions, results, strict=True)]
        controls = [
            _Question(gold=q.gold, answer=q.gold, question="", marked=True) for q in (questions[p] for p in failed)
        ]
        again = [place for place in failed if not _late(results[place].failure)]
        asked = [*controls, *(questions[place] for place in again)]
        answered = self._pool.map([question.payload(self._tolerance) for question in asked])
        passed = dict(zip(failed, answered, strict=False))
        final = {**dict(enumerate(results)), **dict(zip(again, answered[len(failed) :], strict=True))}
        return [_fault(question, final[place], passed.get(place)) for place, question in enumerate(questions)]


def _listed(value: object) -> object:
    """A list of numbers as the vector that it is: `[1, 2]`."""
    numbers = isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)
    return str(list(value)) if numbers and value else value  # type: ignore[call-overload]


def _fault(question: _Question, result: Result, control: Result | None) -> Grade:
    if result.failure is None:
        return question.grade(result)
    if control is not None and control.value == 1:
        return Grade(value=0.0, gave_up=True, note=f"no grader finishes on this answer: {result.failure.message}")
    return Grade(value=None, failure=result.failure.message, timed_out=_late(result.failure))


def _late(failure: Failure | None) -> bool:
    return failure is not None and failure.kind is FailureKind.TIMEOUT


def _best(grades: Sequence[Grade]) -> Grade:
    """Of the grades by several golds: right by one is right; a failure only where none is right."""
    return max(grades, key=lambda grade: (grade.value == 1, grade.failure != "", grade.gave_up))


@lru_cache(maxsize=1 << 16)
def _read(gold: str) -> Value:
    """The gold's typed value: read once however often it is asked about."""
    return read(gold)


def _meets_itself(gold: str) -> bool:
    """Whether the gold, given as the answer, is right by rule."""
    try:
        return answers(_read(gold), gold, gold, NO_ALGEBRA, None, marked=True)
    except Undecided:
        return False
