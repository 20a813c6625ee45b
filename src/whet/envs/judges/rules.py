"""Judges and a writer that are rules: recipes with AI feedback run without a network and without a large model.

They play their part through the same door as an endpoint: they read the question that it would get, and answer in
the words that it would have to use. What they know is column addition, the task of the demo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from whet.envs.judges.fence import opened
from whet.envs.rewards.answers import as_number, final_answer

SUM = re.compile(r"(\d+)\s*\+\s*(\d+)")
STEP = re.compile(r"(\d)\+(\d)\+(\d)=(\d+)")
WORDS = re.compile(r"is one of: (.+)\.$", re.MULTILINE)
LONGEST = 4
"""Characters of an answer that are compared; no sum of two numbers of up to three digits has more."""
LONG = 100
"""Characters of an answer that cannot be too long for `longer`."""

Messages = Sequence[Mapping[str, str]]


def sums(messages: Messages) -> str:
    """A judge that knows addition: right is better than wrong, and shown work is better than none.

    Asked with `visible: everything`, it sees the work inside a thinking block, too.
    """
    question = messages[-1]["content"]
    asked, *answers = opened(question)
    marks = [quality(asked, answer) for answer in answers]
    return f"Marks: {', '.join(f'{mark:g}' for mark in marks)}.\n{verdict(question, marks)}"


def longer(messages: Messages) -> str:
    """A judge with a well-known weakness: the longer answer is the better one. For finding out what that does."""
    question = messages[-1]["content"]
    _, *answers = opened(question)
    return verdict(question, [len(answer) / LONG for answer in answers])


def checker(messages: Messages) -> str:
    """A verifier of one sum that shows its working, to be imitated: it adds, then compares digit by digit.

    To look at two numbers and say whether they are equal is too much for a tiny model; two digits are not.
    """
    question = messages[-1]["content"]
    asked, answer = opened(question)
    left, right = terms(asked)
    total, given = str(left + right), final_answer(answer)[:LONGEST]
    pairs = list(zip_longest(total, given, fillvalue="-"))
    compared = ";".join(f"{first}/{second} {'yes' if first == second else 'no'}" for first, second in pairs)
    worked = f"{left}+{right}:{work(left, right)};{total} or {given}:{compared}"
    return f"{worked}\n{verdict(question, [float(total == given)])}"


def tutor(messages: Messages) -> str:
    """A writer that knows addition: asked for a critique it names the first fault, asked to rewrite it works it out."""
    asked, answer = opened(messages[0]["content"])[:2]
    if len(messages) == 1:
        return critique(asked, answer)
    left, right = terms(asked)
    return f"<think>{work(left, right)}</think><answer>{left + right}</answer>"


def verdict(question: str, marks: Sequence[float]) -> str:
    """The last line of a judge: of two answers the one with the higher mark, of one its place on the scale."""
    words = WORDS.findall(question)[-1].split(", ")
    if len(marks) == 2:
        return f"Verdict: {words[2] if marks[0] == marks[1] else words[marks[0] < marks[1]]}"
    return f"Verdict: {words[round(min(marks[0], 1) * (len(words) - 1))]}"


def quality(asked: str, answer: str) -> float:
    """0 to 1: 0.7 for the right sum, 0.3 for the share of its columns that are worked out rightly."""
    left, right = terms(asked)
    given = as_number(final_answer(answer))
    wanted = work(left, right).split(";")
    shown = {match[0] for match in STEP.finditer(answer)}
    right_sum = given is not None and given == left + right
    return 0.7 * right_sum + 0.3 * sum(step in shown for step in wanted) / len(wanted)


def critique(asked: str, answer: str) -> str:
    """What is wrong with an answer to a sum, in one sentence."""
    left, right = terms(asked)
    missing = [step for step in work(left, right).split(";") if step not in answer]
    if missing:
        return f"The column {missing[0].partition('=')[0]} is not worked out, or not rightly."
    return "The work is shown; see that the total follows from it."


def terms(asked: str) -> tuple[int, int]:
    """The two numbers of the sum that was asked for. Raises ValueError where there is none."""
    found = SUM.search(asked)
    if found is None:
        raise ValueError(f"this judge knows sums only, and there is none in {asked[:60]!r}")
    return int(found[1]), int(found[2])


def work(left: int, right: int) -> str:
    """The sum column by column from the units, each `digit+digit+carry=sum`, with semicolons between."""
    steps, carry = [], 0
    for place in range(max(len(str(left)), len(str(right)))):
        first, second = left // 10**place % 10, right // 10**place % 10
        steps.append(f"{first}+{second}+{carry}={first + second + carry}")
        carry = (first + second + carry) // 10
    return ";".join(steps)
