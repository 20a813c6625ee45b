"""Rows that say which step of an answer is wrong: process supervision.

| columns                            | labels                                                                     |
|------------------------------------|----------------------------------------------------------------------------|
| prompt, steps, labels              | one for each step: true, false, a number in [0, 1]; null: not graded |
| prompt, completions, labels        | the same, as TRL has it                                                    |
| prompt, steps, label               | the index of the first wrong step from 0, -1 where none is (ProcessBench)  |

Labels may stop early: what follows the first wrong step (a label of 0) is never trained on. Steps that end without
white space are set apart by a line end each, or by the row's own `separator`. Other names of columns go through
`data.columns` (`{prompt: problem}`); `known` lists the data sets that are read in their own shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whet.config import DataConfig
from whet.data.base import Row, Stepwise
from whet.data.columns import rename
from whet.data.faults import Dropped, Place, kind_of
from whet.data.known import STEPS
from whet.data.messages import read_settings
from whet.data.sources import read_examples
from whet.data.turns import as_context, filled, turns, with_system


def load_stepwise(config: DataConfig) -> tuple[list[Stepwise], Dropped]:
    """All answers with graded steps, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_stepwise, STEPS)


def to_stepwise(row: Row, config: DataConfig) -> Stepwise:
    """A row as an answer in steps. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    if "prompt" not in columns:
        raise place["prompt"].bad("no such column", f"there are: {', '.join(columns)}; name yours in data.columns")
    name = "steps" if "steps" in columns else "completions"
    steps = _steps(columns, name, place)
    prompt = with_system(turns(columns, "prompt", "user", place), columns, config, place)
    if prompt[-1].role == "assistant":
        raise place["prompt"].bad("no message to answer", "the prompt must end with a user's (or a tool's) message")
    labels = _labels(columns, len(steps), place)
    if all(label is None for label in labels):
        raise place["labels"].left_out("no step has a label")
    wrong = next((index for index, label in enumerate(labels) if label == 0), len(labels))
    return Stepwise(
        origin=row.origin,
        prompt=as_context(prompt),
        steps=_joined(steps, columns.get("separator")),
        labels=labels[: wrong + 1],
        settings=read_settings(columns, place),
    )


def _steps(columns: Mapping[str, Any], name: str, place: Place) -> list[str]:
    listed = columns.get(name)
    if not isinstance(listed, list) or not listed:
        raise place[name].bad("not a list of steps", f"it is {kind_of(listed)}; write the answer's steps as texts")
    return [filled(step, place[name][index]) for index, step in enumerate(listed)]


def _labels(columns: Mapping[str, Any], steps: int, place: Place) -> tuple[float | None, ...]:
    if "labels" in columns:
        listed = columns["labels"]
        if not isinstance(listed, list) or not 0 < len(listed) <= steps:
            raise place["labels"].bad("not one label for each step", f"it is {kind_of(listed)} for {steps} steps")
        return tuple(_label(label, place["labels"][index]) for index, label in enumerate(listed))
    first = columns.get("label")
    if isinstance(first, bool) or not isinstance(first, int) or not -1 <= first < steps:
        raise place["label"].bad(
            "not the index of a step", f"it is {kind_of(first)}; -1 says that none of the {steps} steps is wrong"
        )
    return (1.0,) * steps if first == -1 else (1.0,) * first + (0.0,)


def _label(value: Any, place: Place) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise place.bad(
            "not a label", f"it is {kind_of(value)}; write true, false or a probability from 0 to 1 that it is right"
        )
    return float(value)


def _joined(steps: Sequence[str], separator: object) -> tuple[str, ...]:
    """The steps with what sets them apart: the row's separator, or a line end where a step has no white space."""
    if isinstance(separator, str):
        return (*(step + separator for step in steps[:-1]), steps[-1])
    return (*(step if step[-1].isspace() else f"{step}\n" for step in steps[:-1]), steps[-1])
