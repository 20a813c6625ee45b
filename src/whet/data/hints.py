"""Guesses at which column is which, for the remedy of an error: by the names that data sets give them.

A guess is worth saying only where its text reads like one: no ids, no numbers, no question without the choices or the
passage that it asks about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PROMPTS = ("prompt", "question", "problem", "query", "instruction", "quiz", "problem_text", "text", "input")
"""Names of what is asked, the surest first."""
ANSWERS = (
    "completion", "solution", "canonical_solution", "target", "answer", "gold", "ground_truth", "gt", "output",
    "response", "reference_answer", "rationale", "long_answer", "code",
)  # fmt: skip
"""Names of an answer, that of the data set before one that a model may have given."""
BESIDE = ("body", "context", "contexts", "passage", "premises", "story", "choices", "options", "instances", "code")
"""Names of what a question cannot do without."""


def guess(columns: Mapping[str, Any], *, answered: bool) -> dict[str, str]:
    """`data.columns` for a row: its messages, or its prompt and, if `answered`, its completion. Empty: no guess."""
    if talks := next((name for name, value in columns.items() if _is_chat(value)), None):
        return {"messages": talks}
    by_name = {name.lower(): name for name, value in columns.items() if value not in (None, "", [])}
    prompt = next((by_name[name] for name in PROMPTS if name in by_name and _is_prose(columns[by_name[name]])), None)
    answer = next((by_name[name] for name in ANSWERS if name in by_name and by_name[name] != prompt), None)
    beside = [by_name[name] for name in BESIDE if name in by_name and by_name[name] not in (prompt, answer)]
    alone = answered or prompt in ("text", "input")  # which may be anything, unless an answer stands beside it
    if prompt is None or (alone and answer is None) or not all(isinstance(columns[name], str) for name in beside):
        return {}
    whole = "\n".join(f"{{{name}}}" for name in (*beside, prompt)) if beside else prompt
    named = {"prompt": whole, "completion": answer if answered else None}
    return {ours: theirs for ours, theirs in named.items() if theirs is not None and theirs != ours}


def written(named: Mapping[str, str]) -> str:
    """`data.columns: {prompt: question, completion: answer}`, as it is written in a recipe."""
    entries = (f"{ours}: {theirs if theirs.isidentifier() else json.dumps(theirs)}" for ours, theirs in named.items())
    return f"data.columns: {{{', '.join(entries)}}}"


def _is_chat(value: Any) -> bool:
    keys = value[0].keys() if isinstance(value, list) and value and isinstance(value[0], dict) else ()
    return {"role", "content"} <= set(keys) or {"from", "value"} <= set(keys)


def _is_prose(value: Any) -> bool:
    """Whether it reads like something said: several words, or letters of a script without spaces."""
    if not isinstance(value, str):
        return False
    text = value.strip()
    return sum(map(str.isalpha, text)) >= 8 and (" " in text or not text.isascii())
