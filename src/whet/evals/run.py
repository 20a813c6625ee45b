"""From played answers to the rows of an evaluation table. Pure: the caller plays the tasks and passes the answers.

An answer that could not be graded says nothing about the model: it is left out of every figure and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from whet.evals.stats import (
    detectable_gain,
    differences,
    mean_interval,
    paired_interval,
    pass_at_k,
    ratio_interval,
    sign_flip_p,
)
from whet.records import Group, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """One sampled answer to a task."""

    correct: bool | None
    """None: grading failed; excluded and counted."""
    tokens: int
    truncated: bool
    """The budget ended before the answer did."""
    rewards: Mapping[str, float | None]
    """What each reward gave it, by name; None where one does not apply."""


def sampled_answers(group: Group) -> list[SampledAnswer]:
    """The answers to one task, as they were graded."""
    return [
        SampledAnswer(
            correct=episode.score.correct,
            tokens=episode.sampled_tokens,
            truncated=episode.outcome is Outcome.TRUNCATED,
            rewards=episode.score.parts,
        )
        for episode in group.episodes
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One model's figures on the tasks. Shares and gains are fractions (0.36, not 36); intervals are 95 %."""

    label: str
    accuracy: float
    low: float
    high: float
    pass_at_k: Mapping[int, float]
    mean_length: float
    """Tokens of an answer."""
    truncated: float
    rewards: Mapping[str, float]
    """The mean of each reward over the answers that it applies to: what a policy costs beside what it gets right."""
    samples: int
    """Most scored answers of a task."""
    tasks: int
    unscored: int
    """Answers whose grading failed."""
    scores: Mapping[str, tuple[float, ...]]
    """Each task's scored answers, 1 for right: what a paired comparison is made of."""
    gain: float | None = None
    """Accuracy minus the baseline's, on the tasks that both have; None for the baseline."""
    gain_low: float | None = None
    gain_high: float | None = None
    gain_p: float | None = None
    """Exact two-sided sign-flip p-value of "no difference"."""
    detectable: float | None = None
    """The smallest true gain that these questions show four times of five; None for the baseline."""
    model: str = ""
    """The model's own label, where it answered under several budgets of thinking."""
    thinking: int | None = None
    """Tokens that it could think for; None: no budget."""


def summarise(label: str, answers: Mapping[str, Sequence[SampledAnswer]]) -> EvalRow:
    """The row of one model: task id to its sampled answers.

    pass@k is given for k = 1, 2, 4, ... and the number of samples, each as the mean over the tasks that have at least
    k scored answers. Raises `ValueError` where no answer at all was scored.
    """
    scored = {task: [a for a in given if a.correct is not None] for task, given in answers.items()}
    scored = {task: kept for task, kept in scored.items() if kept}
    if not scored:
        raise ValueError(f"no answer of {label!r} could be graded, so there is nothing to summarise")
    scores = {task: tuple(float(bool(a.correct)) for a in kept) for task, kept in scored.items()}
    kept = [answer for given in scored.values() for answer in given]
    samples = max(len(s) for s in scores.values())
    accuracy = mean_interval(list(scores.values()))
    return EvalRow(
        label=label,
        accuracy=accuracy.mean,
        low=accuracy.low,
        high=accuracy.high,
        pass_at_k={k: _mean_pass_at_k(scores, k) for k in _powers_up_to(samples)},
        mean_length=float(np.mean([answer.tokens for answer in kept])),
        truncated=float(np.mean([answer.truncated for answer in kept])),
        rewards=_mean_rewards(kept),
        samples=samples,
        tasks=len(scores),
        unscored=sum(answer.correct is None for given in answers.values() for answer in given),
        scores=scores,
    )


def compare(rows: Sequence[EvalRow], *, baseline: str | None = None) -> list[EvalRow]:
    """The same rows, each but the baseline (a label; None: the first row) with its paired gain over it.

    Raises `ValueError` where a row shares no scored task with the baseline, or no row has its label.
    """
    if not rows:
        return []
    labels = [row.label for row in rows]
    if baseline is not None and baseline not in labels:
        raise ValueError(f"baseline {baseline!r} is none of {', '.join(labels)}")
    first = rows[0 if baseline is None else labels.index(baseline)]
    return [row if row is first else _with_gain(first, row) for row in rows]


def table(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """The content of `eval.json`: the rows without single answers, and the largest k of pass@k."""
    plain = []
    for row in rows:
        fields = asdict(row)
        del fields["scores"]
        plain.append({**fields, "pass_at_k": {str(k): share for k, share in row.pass_at_k.items()}})
    return {"rows": plain, "k": max((row.samples for row in rows), default=0)}


def _with_gain(first: EvalRow, row: EvalRow) -> EvalRow:
    both = [task for task in first.scores if task in row.scores]
    if not both:
        raise ValueError(f"{first.label!r} and {row.label!r} have no scored task in common, so no gain can be given")
    before, after = [first.scores[task] for task in both], [row.scores[task] for task in both]
    gain = paired_interval(before, after)
    p = sign_flip_p(differences(before, after))
    least = detectable_gain(before, after)
    return replace(row, gain=gain.mean, gain_low=gain.low, gain_high=gain.high, gain_p=p, detectable=least)


def _mean_rewards(answers: Sequence[SampledAnswer]) -> dict[str, float]:
    given: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.rewards.items():
            if value is not None:
                given.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in given.items()}


def _mean_pass_at_k(scores: Mapping[str, Sequence[float]], k: int) -> float:
    enough = [s for s in scores.values() if len(s) >= k]
    return float(np.mean([pass_at_k(right=int(sum(s)), samples=len(s), k=k) for s in enough]))


def _powers_up_to(samples: int) -> list[int]:
    powers = [1 << exponent for exponent in range(samples.bit_length())]
    return sorted({*powers, samples})


RowLoss = tuple[float, int, int]
"""Of one row under one model: nats over its trained tokens, how many they are, and a checksum of all tokens."""


def loss_table(losses: Mapping[str, Sequence[RowLoss]], baseline: str | None = None) -> dict[str, Any]:
    """`rows`: one for each model, with its paired difference to the baseline (None: the
    first), which is null where the two cut the rows into other tokens."""
    first = losses[baseline or next(iter(losses))]
    rows = []
    for label, given in losses.items():
        nats, tokens = [row[0] for row in given], [row[1] for row in given]
        loss, change = ratio_interval(nats, tokens), None
        if given is not first and [row[2] for row in given] == [row[2] for row in first]:
            change = ratio_interval([row[0] - before[0] for row, before in zip(given, first, strict=True)], tokens)
        row = {"label": label, "loss": loss.mean, "low": loss.low, "high": loss.high, "rows": len(given)}
        row |= {"perplexity": math.exp(min(loss.mean, 700.0)), "tokens": int(sum(tokens))}
        row |= {"change": None if change is None else change.mean}
        rows.append(row | {f"change_{end}": change and getattr(change, end) for end in ("low", "high")})
    return {"rows": rows}
