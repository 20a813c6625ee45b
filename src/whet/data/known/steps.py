"""Data sets that say which steps of an answer are right.

| data set          | known by                                         | becomes                                      |
|-------------------|--------------------------------------------------|----------------------------------------------|
| PRM800K           | question.problem, label.steps                    | the solution, and each alternative to a step |
| Math-Shepherd     | input, label, task                               | every step right or wrong                    |
| ProcessBench      | problem, steps, label                            | steps up to the first wrong one              |
| PRMBench          | modified_question, modified_process, error_steps | the same                                     |
| BIG-Bench Mistake | input, steps, mistake_index                      | the same                                     |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from whet.data.columns import pick
from whet.data.faults import Place, kind_of
from whet.data.known.base import Columns, Known, one_of
from whet.data.turns import text_of

_MARK = "\u043a\u0438"
"""What ends a step of Math-Shepherd: two Cyrillic letters that stand nowhere else."""


def _prm800k(columns: Columns, place: Place) -> Iterator[Columns]:
    """The solution as it went on up to a wrong step; then each step that was not chosen, after those before it."""
    problem = columns["question"]["problem"]
    texts, labels, others = list[str](), list[float | None](), list[Columns]()
    for index, step in enumerate(pick(columns, "label.steps[]", place)):
        at = place["label"]["steps"][index]
        offered = pick(step, "completions[].text", at)
        ratings = [completion.get("rating") for completion in step["completions"]]
        graded = [_graded(rating, at["completions"][i]["rating"]) for i, rating in enumerate(ratings)]
        chosen = step.get("chosen_completion")
        before: list[float | None] = [None] * len(texts)  # graded once, with the solution
        others += [
            {"prompt": problem, "steps": [*texts, text], "labels": [*before, label]}
            for i, (text, label) in enumerate(zip(offered, graded, strict=True))
            if i != chosen
        ]
        if chosen is not None and (type(chosen) is not int or not 0 <= chosen < len(offered)):
            raise at["chosen_completion"].bad("none of the completions", f"it is {kind_of(chosen)} of {len(offered)}")
        if chosen is not None:
            texts.append(offered[chosen])
            labels.append(graded[chosen])
        elif step.get("human_completion") is not None:  # written where all offered ones were wrong
            texts.append(pick(step, "human_completion.text", at))
            labels.append(1.0)
        else:
            break
        if labels[-1] == 0:
            break
    if texts:
        yield {"prompt": problem, "steps": texts, "labels": labels}
    yield from others


def _graded(rating: Any, place: Place) -> float | None:
    """A neutral step (0) is right, as in the paper's own scores (2305.20050, appendix F); null has no label."""
    return None if rating is None else float(one_of(rating, (-1, 0, 1), place) >= 0)


def _math_shepherd(columns: Columns, place: Place) -> Columns:
    """The answer's text with the mark after each step; the label is the same text with a sign in place of the mark."""
    pieces = text_of(columns, "input", place).strip().split(_MARK)
    problem, first, begun = pieces[0].partition("Step 1:")
    if not first or len(pieces) < 2 or pieces[-1].strip():
        raise place["input"].bad(
            "no steps that begin with 'Step 1:' and end with the mark of Math-Shepherd",
            "where the rows are of another set, say which column is which in data.columns",
        )
    signs = re.fullmatch("([+-])".join(map(re.escape, pieces)), text_of(columns, "label", place).strip(), re.DOTALL)
    if signs is None:
        raise place["label"].bad("not the input with + or - after each step", "take both from the same row")
    steps = [step.strip() for step in (first + begun, *pieces[1:-1])]
    return {"prompt": problem.strip(), "steps": steps, "labels": [sign == "+" for sign in signs.groups()]}


def _prmbench(columns: Columns, place: Place) -> Columns:
    steps, wrong = columns["modified_process"], columns["error_steps"]
    for name, listed in (("modified_process", steps), ("error_steps", wrong)):
        if not isinstance(listed, list):
            raise place[name].bad("not a list", f"it is {kind_of(listed)}")
    for index, number in enumerate(wrong):
        if type(number) is not int or not 1 <= number <= len(steps):
            raise place["error_steps"][index].bad("not one of the steps", f"it is {kind_of(number)} of {len(steps)}")
    return {"prompt": columns["modified_question"], "steps": steps, "label": min(wrong, default=0) - 1}


STEPS: Known = {
    ("question.problem", "label.steps"): _prm800k,
    ("input", "label", "task"): _math_shepherd,
    ("problem", "steps", "label"): lambda c, _: {"prompt": c["problem"]},
    ("modified_question", "modified_process", "error_steps"): _prmbench,
    ("input", "steps", "mistake_index"): lambda c, _: {
        "prompt": c["input"], "label": -1 if c["mistake_index"] is None else c["mistake_index"]},
}  # fmt: skip
