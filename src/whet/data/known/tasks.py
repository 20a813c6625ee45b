"""Data sets of tasks: the question, the gold answer, and in the column `verifier` the checker's name."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from whet.data.faults import Place
from whet.data.known.base import Columns, Known

LONGEST_GOLD = 200
"""Characters of a gold answer that can be compared as it stands."""

_Read = Callable[[Columns], dict[str, Any] | list[dict[str, Any]]]


def _task(verifier: str, read: _Read) -> Callable[[Columns, Place], Iterator[Columns]]:
    """Rows with the columns that `read` gives, checked by `verifier`, where it names no other."""

    def known(columns: Columns, place: Place) -> Iterator[Columns]:
        try:
            made = read(columns)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise place.bad(f"looks like a task for {verifier!r} and is none", f"{why}; or map data.columns") from error
        for each in made if isinstance(made, list) else [made]:
            yield {"verifier": columns.get("verifier", verifier), **each}

    return known


def _asked(prompt: str, gold: str) -> _Read:
    """A prompt of columns in braces, and the column with the gold answer."""
    return lambda columns: {"prompt": prompt.format_map(columns), "answer": columns[gold]}


def _qa(columns: Columns) -> dict[str, Any]:
    answer = columns["answer"]
    if isinstance(answer, str) and "####" in answer:
        return {"prompt": columns["question"], "verifier": "math"}
    if len(str(answer)) > LONGEST_GOLD:
        raise ValueError(f"an answer of more than {LONGEST_GOLD} characters is no gold")
    return {"prompt": columns["question"]}


def _knights(columns: Columns) -> dict[str, Any]:
    roles = zip(columns["names"], columns["solution"], strict=True)
    gold = ", ".join(f"{name} is a {'knight' if role else 'knave'}" for name, role in roles)
    return {"prompt": columns["quiz"], "answer": gold}


def _countdown(columns: Columns) -> dict[str, Any]:
    listed, target = ", ".join(map(str, columns["nums"])), columns["target"]
    asked = f"Use {listed} to make {target}, each number exactly once, with + - * / and parentheses."
    return {"prompt": asked, **({"answer": columns["solution"]} if "solution" in columns else {})}


def _game24(columns: Columns) -> dict[str, Any]:
    task = {"nums": [int(number) for number in columns["Puzzles"].split()], "target": 24}
    return {**task, **_countdown(task)}


def _zebra(columns: Columns) -> dict[str, Any]:
    house, *attributes = columns["solution"]["header"]
    rows = columns["solution"]["rows"]
    gold = {f"{house} {row[0]}": dict(zip(attributes, row[1:], strict=True)) for row in rows}
    return {"prompt": columns["puzzle"], "answer": json.dumps(gold, ensure_ascii=False)}


def _arc(columns: Columns) -> list[dict[str, Any]]:
    shown = [f"Input:\n{_rows(each['input'])}\nOutput:\n{_rows(each['output'])}\n\n" for each in columns["train"]]
    return [
        {"prompt": f"{''.join(shown)}Input:\n{_rows(each['input'])}\nOutput:", "answer": each["output"]}
        for each in columns["test"]
    ]


def _rows(grid: Sequence[Sequence[int]]) -> str:
    return "\n".join(" ".join(map(str, row)) for row in grid)


def _folio(columns: Columns) -> dict[str, Any]:
    premises = columns["premises"]
    listed = premises if isinstance(premises, str) else "\n".join(premises)
    asked = f"{listed}\n\nIs this true, false or uncertain? {columns['conclusion']}"
    return {"prompt": asked, "answer": columns["label"]}


def _bbh(columns: Columns) -> dict[str, Any]:
    target = columns["target"]
    words = " " in target or not any(map(str.isalnum, target))  # a list in its order, or brackets
    return {"prompt": columns["input"], "answer": target, "verifier": "exact" if words else "answer"}


def _options(question: str, options: Sequence[str], right: str | int) -> dict[str, Any]:
    """A question with lettered options; the right one is told by its letter, or its place from 0."""
    lettered = zip(string.ascii_uppercase, options, strict=False)
    lines = [f"{letter}) {text.removeprefix(f'{letter})').strip()}" for letter, text in lettered]
    at = right if isinstance(right, int) else string.ascii_uppercase.index(right)
    return {"prompt": "\n".join([question, *lines]), "answer": lines[at]}


def _pubmed(columns: Columns) -> dict[str, Any]:
    asked = "\n".join([*columns["CONTEXTS"], f"{columns['QUESTION']} Answer yes, no or maybe."])
    return {"prompt": asked, "answer": columns["final_decision"]}


def _scibench(columns: Columns) -> dict[str, Any]:
    unit = columns["unit"].strip(" $")
    power = "\\times " if unit.startswith("10^") else ""  # of ten: it belongs to the number
    return {"prompt": columns["problem_text"], "answer": f"{columns['answer_number']} {power}{unit}".strip()}


TASKS: Known = {
    ("prompt", "instruction_id_list", "kwargs"): _task("instructions", lambda c: {}),  # IFEval, IFBench
    ("question", "answer", "metadata.source_dataset"): _task("reasoning_gym", lambda c: {"prompt": c["question"]}),
    ("quiz", "names", "solution"): _task("knights_knaves", _knights),
    ("nums", "target"): _task("countdown", _countdown),
    ("Puzzles", "Rank"): _task("countdown", _game24),
    ("puzzle", "solution.header", "solution.rows"): _task("zebra", _zebra),  # ZebraLogic
    ("puzzle", "solution"): _task("sudoku", _asked("Fill in this sudoku; 0 or . is empty:\n{puzzle}", "solution")),
    ("prompt", "variables", "constraints"): _task("constraints", lambda c: {}),
    ("train[].input", "test[].output"): _task("grid", _arc),  # ARC-AGI
    ("premises", "conclusion", "label"): _task("answer", _folio),
    ("task", "input", "target"): _task("answer", _bbh),
    ("question", "options", "correct"): _task(  # AQuA
        "answer", lambda c: _options(c["question"], c["options"], c["correct"])),
    ("question", "choices.text", "choices.label", "answerKey"): _task(  # AI2 ARC, CommonsenseQA
        "answer", lambda c: _options(c["question"], c["choices"]["text"], c["choices"]["label"].index(c["answerKey"]))),
    ("question", "choices", "answer"): _task(  # MMLU
        "answer", lambda c: _options(c["question"], c["choices"], c["answer"])),
    ("QUESTION", "CONTEXTS", "final_decision"): _task("answer", _pubmed),
    ("problem_text", "answer_number", "unit"): _task(  # SciBench
        "answer", _scibench),
    ("Question", "Answer", "Answer_type"): _task("answer", _asked("{Question}", "Answer")),  # TheoremQA
    ("Body", "Question", "Answer"): _task("math", _asked("{Body} {Question}", "Answer")),  # SVAMP
    ("input", "target"): _task("math", _asked("{input}", "target")),  # MAWPS
    ("problem", "answer"): _task("answer", _asked("{problem}", "answer")),  # MATH, AIME
    ("problem", "solution"): _task("answer", _asked("{problem}", "solution")),
    ("question", "ground_truth"): _task("answer", _asked("{question}", "ground_truth")),  # Big-Math
    ("question", "answer"): _task("answer", _qa),  # GSM8K, and short golds of any type
}  # fmt: skip
