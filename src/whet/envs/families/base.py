"""What a task family is: problems by number, with answers of known worth; and the first of them, sums.

Right with its work shown > right > wrong with work > wrong. Preferences that people state are noisy; these follow from
a score that is known, so that what a method learned from them can be told exactly. Held-out problems are chosen by a
hash of the problem itself, so no seed and no count can mix the two halves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import ClassVar, TypeVar, overload

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task, graded
from whet.envs.rewards.answers import as_number, final_answer
from whet.records import Message, StepScore

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


# ------------------------------------------------------------------------------------- arithmetic
# Addition in columns: the smallest task on which thinking pays. A sum such as `35+79` can be answered at a glance,
# often wrongly, or in steps from the units up, each of them `digit + digit + carry = sum`: `5+9+0=14;3+7+1=11`. A base
# model that has seen both finds out by RL which one pays.

GAPS = (":", ": ", " -> ", "\n", "\n\n", "?\nA: ", " is ... ", "\nsteps:\n", "       ")
ENDS = (";", "; ", "\n", " > ", ". So ")
"""How running text may go on after a sum and after its steps: a base model should not depend on one layout."""

BRIEF = "brief"
WISHES = ("show", BRIEF)
_STEP = re.compile(r"\d\+\d\+\d=\d+")


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
    def columns(self) -> int:
        """Digits of the longer number."""
        return max(len(str(self.left)), len(str(self.right)))

    @property
    def steps(self) -> str:
        """Column by column from the units, with carries; the last column keeps its tens."""
        return self.steps_with(slip=0, at=0)

    def steps_with(self, *, slip: int, at: int) -> str:
        """The same with `slip` added to the sum of column `at`, and whatever follows from it."""
        lines, carry = [], 0
        for place in range(self.columns):
            left, right = self.left // 10**place % 10, self.right // 10**place % 10
            found = left + right + carry + (slip if place == at else 0)
            lines.append(f"{left}+{right}+{carry}={found}")
            carry = found // 10
        return ";".join(lines)


@dataclass(frozen=True, slots=True)
class Arithmetic(Family):
    """Sums of two numbers of 1 to `digits` digits, the length of each uniform."""

    version: ClassVar[int] = 1
    checks_steps: ClassVar[bool] = True
    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """The sum as a user message; the column `answer` has the total, `difficulty` the number of its columns.

        Where prompts have wishes the message ends with one, and the column `wish` has it.
        """
        problem, wish = self._problem(index), self._wish(index)
        asked = self.config.question.replace("{}", str(problem)) + (f" {wish}" if wish else "")
        return Task(
            id=f"arithmetic:{index}:{problem}",
            messages=(Message(role="user", content=asked),),
            columns={"answer": str(problem.total), "difficulty": problem.columns, **({"wish": wish} if wish else {})},
        )

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """The sum solved, a share `bare` of them without steps; one line of text each where the config is `plain`."""
        problem = self._problem(index)
        style = Random(f"arithmetic style/{self.config.seed}/{index}")
        bare = style.random() < self.config.bare
        if self.config.plain:
            gap, end = style.choice(GAPS), style.choice(ENDS)
            return f"{problem}{gap}={problem.total}" if bare else f"{problem}{gap}{problem.steps}{end}{problem.total}"
        solved = as_written("" if bare else problem.steps, problem.total)
        return *self.task(index).messages, Message(role="assistant", content=solved)

    def kinds(self, index: int) -> tuple[str, ...]:
        """Right or wrong, with its columns or without; a wrong one slips by one in some column."""
        problem = self._problem(index)
        random = Random(f"arithmetic slips/{self.config.seed}/{index}")
        at, bare_at = random.randrange(problem.columns), random.randrange(problem.columns)
        slip = random.choice([-1, 1] if problem.total >= 10**bare_at else [1])
        right = (as_written(problem.steps, problem.total), as_written("", problem.total))
        wrong = (
            as_written(problem.steps_with(slip=1, at=at), problem.total + 10**at),
            as_written("", problem.total + slip * 10**bare_at),
        )
        return (*right[::-1], *wrong[::-1]) if self._wish(index) == BRIEF else (*right, *wrong)

    def worth(self, attempt: Attempt) -> float:
        """Whether it is right, and whether it goes through every column, or through none where it is to be brief."""
        wished = not _shown(attempt) if attempt.task.columns.get("wish") == BRIEF else self.worked(attempt)
        return (2 * (self.verify(attempt).value == 1) + wished) / 3

    def worked(self, attempt: Attempt) -> bool:
        """Whether it goes through every column, whatever the prompt wishes."""
        return _shown(attempt) >= _sum_of(attempt.task).columns

    def verify(self, attempt: Attempt) -> Grade:
        """1 if the final answer is the total."""
        given, gold = final_answer(attempt.answer), attempt.task.columns["answer"]
        return graded(as_number(given) == int(gold), given, gold)

    def check_steps(self, attempt: Attempt) -> Grade:
        """1 for each written step that is the sum's own at its place, else 0; the last step is the final answer."""
        text = attempt.answer
        if not text:
            return Grade(value=None)
        expected = _sum_of(attempt.task).steps.split(";")
        opened, closed = text.find("<think>"), text.find("</think>")
        begin, end = 0 if opened < 0 else opened + len("<think>"), len(text) if closed < 0 else closed
        graded: list[StepScore] = []
        for place, written in enumerate(text[begin:end].split(";") if end > begin else ()):
            begin += len(written) + 1
            right_here = place < len(expected) and written == expected[place]
            graded.append(StepScore(end=min(begin, end), value=float(right_here)))
        verdict = self.verify(attempt).value
        assert verdict is not None, "it always says right or wrong"
        graded = [step for step in graded if step.end < len(text)]
        graded.append(StepScore(end=len(text), value=verdict))
        share = fmean(step.value for step in graded)
        return Grade(value=None, steps=tuple(graded), metrics={"right": share, "count": float(len(graded))})

    def _problem(self, index: int) -> Sum:
        return draw_problem(self.config, index, self._draw, _identity)

    def _wish(self, index: int) -> str:
        """What the prompt asks for beside the sum; nothing where prompts have no wishes."""
        if not self.config.style_instructions:
            return ""
        return Random(f"arithmetic wish/{self.config.seed}/{index}").choice(WISHES)

    def _draw(self, random: Random) -> Sum:
        return Sum(_number(random, self.config.digits), _number(random, self.config.digits))


def _sum_of(task: Task) -> Sum:
    left, right = task.id.rpartition(":")[2].split("+")
    return Sum(int(left), int(right))


def _shown(attempt: Attempt) -> int:
    """Columns that the answer goes through."""
    return len(_STEP.findall(attempt.answer.partition("</think>")[0]))


def _number(random: Random, digits: int) -> int:
    """A number whose count of digits is uniform; 0 has one digit."""
    length = random.randint(1, digits)
    return random.randrange(0 if length == 1 else 10 ** (length - 1), 10**length)


def _identity(problem: Sum) -> str:
    return "arithmetic {}+{}".format(*sorted((problem.left, problem.right)))
