"""Numbers that are not finite: kept from every statistic and from the optimizer, and traced to their rollouts.

One NaN in a step would be in the mean of its group, then in the whitening of the step, then in the weights. So an
answer with such a number is left out before anything is computed from it, and what is left out is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np

from whet.algorithms.columns import Answer
from whet.records import Atom
from whet.training.base import Objective, OptimResult, Trainer

NAMED = 3
"""Most rollouts that one line names."""


def drop_nonfinite(answers: Sequence[Answer]) -> tuple[list[Answer], list[str]]:
    """The answers whose columns are all finite, and of each of the others `NAME (column is nan)`."""
    faults = [_fault(answer) for answer in answers]
    kept = [answer for answer, fault in zip(answers, faults, strict=True) if fault is None]
    return kept, [f"{name_of(a)} ({fault})" for a, fault in zip(answers, faults, strict=True) if fault is not None]


def find_nonfinite(
    trainer: Trainer, answers: Sequence[tuple[Answer, Sequence[Atom]]], objective: Objective
) -> list[str]:
    """The answers, each given with its own atoms, whose loss is not finite by itself."""
    return [
        name_of(answer)
        for answer, atoms in answers
        if atoms and not isfinite(trainer.evaluate(atoms, objective)["loss"].total)
    ]


def name_of(answer: Answer) -> str:
    """An answer as it is found in the step's rollout file."""
    return f"task {answer.episode.task} sample {answer.episode.sample}"


def listed(names: Sequence[str], step: int) -> str:
    """`task a sample 3, task b sample 0 and 5 more (rollouts/step-000012.parquet)`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} (rollouts/step-{step:06d}.parquet)"


def skipped_update(result: OptimResult) -> str:
    """What became of an update, and where its gradient was first not finite."""
    return f"an update was skipped, the gradient of {result.not_finite} was not finite"


def _fault(answer: Answer) -> str | None:
    for row in answer.rows:
        for name, values in row.columns.items():
            wrong = values[~np.isfinite(values)]
            if len(wrong):
                return f"{name} is {wrong[0]}"
    return None
