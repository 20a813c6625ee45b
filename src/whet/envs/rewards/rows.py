"""The verifier that a row names, in its column `verifier`: rows of several kinds in one file, each checked by its own.

Published data sets that are known by their columns get the name when they are read (`data.known.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from whet.data.faults import nearest
from whet.envs.base import Attempt, Grade, PlainReward, Separate, Task
from whet.envs.rewards.answers import whole_answer
from whet.envs.rewards.exact import exact, exact_gold
from whet.envs.rewards.instructions import check_instructions, instructions
from whet.envs.rewards.logic import LOGIC, LONGEST_ANSWER, Columns
from whet.envs.rewards.math import MathReward
from whet.envs.rewards.reasoning_gym import GymReward
from whet.errors import DataError

Rule = Callable[[Columns, str], bool]
Verifier = MathReward | PlainReward | GymReward


class RowVerifier(Separate):
    """1 if the row's own verifier, or the one called `verifier`, accepts the answer."""

    judges = True

    def __init__(self, *, name: str, weight: float, verifier: str | None = None) -> None:
        self.name, self.weight, self._verifier = name, weight, verifier
        self._built: dict[str, Verifier] = {}

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """The grade of each attempt by the verifier of its task."""
        return self._split(attempts, lambda one, some: one.each([attempts[place] for place in some], step=step))

    def settle(self, attempts: Sequence[Attempt], grades: Sequence[Grade], *, step: int) -> list[Grade]:
        """As those verifiers do."""

        def settled(one: Separate, some: Sequence[int]) -> list[Grade]:
            return one.settle([attempts[place] for place in some], [grades[place] for place in some], step=step)

        return self._split(attempts, settled)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task whose verifier is not known, or refuses the row or its gold answer."""
        for task in tasks:
            self._reward(self._name(task)).check([task])

    def close(self) -> None:
        """End the verifiers' processes."""
        for reward in self._built.values():
            reward.close()

    def _split(
        self, attempts: Sequence[Attempt], asked: Callable[[Separate, Sequence[int]], list[Grade]]
    ) -> list[Grade]:
        """The grades by each verifier of the attempts at its tasks, in the attempts' order."""
        places: dict[str, list[int]] = {}
        for place, attempt in enumerate(attempts):
            places.setdefault(self._name(attempt.task), []).append(place)
        grades: dict[int, Grade] = {}
        for name, some in places.items():
            grades |= zip(some, asked(self._reward(name), some), strict=True)
        return [grades[place] for place in range(len(attempts))]

    def _name(self, task: Task) -> str:
        found = self._verifier or task.columns.get("verifier")
        if found is None:
            raise DataError(
                f"task {task.id}: its columns ({', '.join(sorted(task.columns)) or 'none'}) are of no known data set; "
                "name the reward, for example rewards: [{kind: math, gold: YOUR_COLUMN}], or of an environment "
                "[{kind: environment}]"
            )
        if found not in VERIFIERS:
            raise DataError(f"task {task.id}: verifier {found!r} is not known; {nearest(str(found), VERIFIERS)}")
        return str(found)

    def _reward(self, verifier: str) -> Verifier:
        if verifier not in self._built:
            self._built[verifier] = VERIFIERS[verifier](name=self.name, weight=self.weight)
        return self._built[verifier]


def solves(attempt: Attempt, *, rule: Rule) -> Grade:
    """1 if the answer (what is marked as such, else the last paragraph, or all) meets a rule of `logic`."""
    text = whole_answer(attempt.answer)
    if len(text) > LONGEST_ANSWER:
        return Grade(value=0.0, note=f"the answer has more than {LONGEST_ANSWER} characters")
    return Grade(value=float(any(rule(attempt.task.columns, each) for each in {text, text.rpartition("\n\n")[2]})))


def check_puzzle(task: Task, *, rule: Rule) -> None:
    """Raise `DataError` for a row that is no such puzzle, or whose gold answer breaks its own rules."""
    gold = task.columns.get("answer")
    try:
        right = rule(task.columns, "" if gold is None else str(gold))
    except (AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError) as error:
        why = f"no column {error}" if isinstance(error, KeyError) else f"no such puzzle: {error}"
        raise DataError(f"task {task.id}: {why}; correct the row, or map data.columns") from error
    if gold is not None and not right:
        raise DataError(f"task {task.id}: its answer {str(gold)[:80]!r} breaks the puzzle's own rules; correct the row")


def _plain(function: Callable[..., Grade], check_task: Callable[[Task], object]) -> Callable[..., PlainReward]:
    return partial(PlainReward, judges=True, function=function, check_task=check_task)


VERIFIERS: Mapping[str, Callable[..., Verifier]] = {
    "math": partial(MathReward, gold="answer", deadline_s=2.0),
    "answer": partial(MathReward, gold="answer", deadline_s=2.0, words=True),
    "exact": _plain(partial(exact, gold="answer"), partial(exact_gold, column="answer")),
    "instructions": _plain(instructions, check_instructions),
    "reasoning_gym": GymReward,
    **{name: _plain(partial(solves, rule=rule), partial(check_puzzle, rule=rule)) for name, rule in LOGIC.items()},
}
"""By the names that rows and recipes use."""
