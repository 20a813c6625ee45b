"""Whether an answer follows instructions that can be checked: IFEval's and IFBench's, strict or loose."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import product
from statistics import fmean
from typing import Any

from whet.data.faults import nearest
from whet.envs.base import Attempt, Grade, Task, require
from whet.envs.rewards.answers import in_tags
from whet.envs.rewards.ifbench import IFBENCH
from whet.envs.rewards.ifeval import IFEVAL, Check
from whet.errors import DataError

KINDS: Mapping[str, Check] = {**IFEVAL, **IFBENCH}
LONGEST = 50_000
"""Characters; a longer answer follows nothing, for some checks take long on it."""


def instructions(attempt: Attempt, *, loose: bool = False, share: bool = False) -> Grade:
    """1 if every instruction of the row is followed, else 0; with `share`, the share of them that is.

    loose (IFEval, section 2.2): an answer follows what it follows without its first line, its last line, or stars.
    Metrics: `followed`, the strict share; `loose`, whether all are followed in the loose sense.
    """
    asked, text = _asked(attempt.task), in_tags(attempt.answer)
    if len(text) > LONGEST:
        return Grade(value=0.0, note=f"the answer has more than {LONGEST} characters")
    lines = text.split("\n")
    cut = ["\n".join(lines[first : len(lines) - last]).strip() for first, last in product((0, 1), repeat=2)]
    strictly, loosely = (
        [any(tried and bool(KINDS[kind](tried, **given)) for tried in texts) for kind, given in asked]
        for texts in ([text], [*cut, *(each.replace("*", "") for each in cut)])
    )
    followed = loosely if loose else strictly
    metrics = {"followed": fmean(strictly), "loose": float(all(loosely))}
    return Grade(value=fmean(followed) if share else float(all(followed)), metrics=metrics)


def check_instructions(task: Task) -> None:
    """Raise `DataError` for a row with an instruction that is not known, or with other arguments than it takes."""
    for kind, given in _asked(task):
        try:
            inspect.signature(KINDS[kind]).bind("", **given)
            KINDS[kind]("A trial. It has two sentences", **given)
        except Exception as error:  # whatever arguments of a wrong type lead to
            why = f"instruction {kind!r} with {given}: {error}"
            raise DataError(f"task {task.id}: {why}; correct its kwargs") from error


def _asked(task: Task) -> list[tuple[str, dict[str, Any]]]:
    """The instructions of a row with their arguments, nulls aside: published rows list all. Raises `DataError`."""
    kinds, given = (require(task, column, "instructions") for column in ("instruction_id_list", "kwargs"))
    if not isinstance(kinds, list) or not isinstance(given, list) or len(kinds) != len(given) or not kinds:
        raise DataError(f"task {task.id}: instruction_id_list and kwargs are not lists of one length; write one each")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"task {task.id}: instruction {unknown[0]!r} is not known; {nearest(str(unknown[0]), KINDS)}")
    arguments = ({key: value for key, value in (each or {}).items() if value is not None} for each in given)
    return list(zip(kinds, arguments, strict=True))
