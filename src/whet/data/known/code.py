"""Data sets of programming tasks: what is asked, and a solution as the answer. The columns with tests stay beside it.

Which they are is a table of `docs/data.md`. Of the tests, prompts show MBPP's first assert and no other: a policy that
sees a test may answer that test alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from whet.data.faults import Place
from whet.data.known.base import Columns, Known
from whet.data.turns import text_of


def _leetcode(columns: Columns, place: Place) -> Columns:
    return {
        "prompt": text_of(columns, "query", place),
        "completion": _block(text_of(columns, "completion", place)),
        "prefix": columns["prompt"],
    }


def _humaneval(columns: Columns, place: Place) -> Columns:
    start = text_of(columns, "prompt", place)
    return {
        "prompt": f"Complete this Python function:\n\n{_block(start)}",
        "completion": _block(start + text_of(columns, "canonical_solution", place)),
        "prefix": start,
    }


def _mbpp(columns: Columns, place: Place) -> Columns:
    question = text_of(columns, "text" if "text" in columns else "prompt", place)
    tests = columns["test_list"]
    if not isinstance(tests, list) or not tests:
        raise place["test_list"].bad("no list of asserts", "leave the row out")
    return {
        "prompt": f"{question}\n\nYour code should pass this test:\n\n{_block(str(tests[0]))}",
        "completion": _block(text_of(columns, "code", place)),
    }


def _cruxeval(columns: Columns, place: Place) -> Columns:
    code, given = text_of(columns, "code", place), columns["input"]
    asked = f"What is the value of f({given})? Answer with a Python literal between [ANSWER] and [/ANSWER]."
    return {"prompt": f"{_block(code)}\n\n{asked}", "completion": f"[ANSWER]{columns['output']}[/ANSWER]"}


def _contest(question: str) -> Callable[[Columns, Place], Columns]:
    def read(columns: Columns, place: Place) -> Columns:
        start = columns.get("starter_code")
        how = f"Complete this code:\n\n{_block(start)}" if start else "Read standard input and print the answer."
        made = {"prompt": f"{text_of(columns, question, place)}\n\nWrite Python. {how}"}
        solutions = columns.get("solutions")
        if isinstance(solutions, str):
            solutions = json.loads(solutions or "[]")
        return {**made, "completion": _block(solutions[0])} if solutions else made

    return read


def _block(code: str) -> str:
    return f"```python\n{code.strip(chr(10))}\n```"


CODE: Known = {
    ("query", "completion", "entry_point", "test"): _leetcode,
    ("prompt", "canonical_solution", "entry_point", "test"): _humaneval,
    ("prompt", "canonical_solution", "entry_point", "base_input"): _humaneval,
    ("text", "code", "test_list"): _mbpp,
    ("prompt", "code", "test_list"): _mbpp,
    ("code", "input", "output"): _cruxeval,
    ("question_content", "public_test_cases"): _contest("question_content"),
    ("question", "input_output"): _contest("question"),
    ("problem", "tests"): _contest("problem"),
}
