"""From played answers to the rows of an evaluation table. Pure: the caller plays the tasks and passes the answers.

An answer that could not be graded says nothing about the model: it is left out of every figure and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from whet.evals.stats import (
    best_of_k,
    detectable_gain,
    differences,
    maj_at_k,
    mean_interval,
    paired_interval,
    pass_at_k,
    ratio_interval,
    sign_flip_p,
)
from whet.records import Episode, Group, Outcome


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
    vote: str | None = None
    """Its final answer in the form that a majority counts; None: no answer, or votes are not counted."""


def sampled_answers(group: Group, vote: Callable[[Episode], str | None] = lambda _: None) -> list[SampledAnswer]:
    """The answers to one task, as they were graded."""
    return [
        SampledAnswer(
            correct=episode.score.correct,
            tokens=episode.sampled_tokens,
            truncated=episode.outcome is Outcome.TRUNCATED,
            rewards=episode.score.parts,
            vote=vote(episode),
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
    of_k: Mapping[str, Mapping[int, float]]
    """What k answers come to, by k: `pass`, one of them is right; `maj`, what most of them say; `best NAME`, the one
    that the reward of this name likes best."""
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
    step: float | None = None
    """Accuracy minus that of the row before, with the same statistics; None for the first row."""
    step_low: float | None = None
    step_high: float | None = None
    step_p: float | None = None
    model: str = ""
    """The model's own label, where it answered under several budgets of thinking."""
    thinking: int | None = None
    """Tokens that it could think for; None: no budget."""


def summarise(label: str, answers: Mapping[str, Sequence[SampledAnswer]], choosers: Sequence[str] = ()) -> EvalRow:
    """The row of one model: task id to its sampled answers. `choosers`: rewards that may choose among them.

    What k answers come to is given for k = 1, 2, 4, ... and the number of samples, each as the mean over the tasks that
    have at least k scored answers. Raises `ValueError` where no answer at all was scored.
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
        of_k=_of_k(scored, samples, choosers),
        mean_length=float(np.mean([answer.tokens for answer in kept])),
        truncated=float(np.mean([answer.truncated for answer in kept])),
        rewards=_mean_rewards(kept),
        samples=samples,
        tasks=len(scores),
        unscored=sum(answer.correct is None for given in answers.values() for answer in given),
        scores=scores,
    )


def compare(rows: Sequence[EvalRow], *, baseline: str | None = None) -> list[EvalRow]:
    """The same rows, each with its paired gains over the baseline (a label; None: the first row) and the row before.

    Raises `ValueError` where two of them share no scored task, or no row has the label.
    """
    if not rows:
        return []
    labels = [row.label for row in rows]
    if baseline is not None and baseline not in labels:
        raise ValueError(f"baseline {baseline!r} is none of {', '.join(labels)}")
    first = rows[0 if baseline is None else labels.index(baseline)]
    found = [row if row is first else replace(row, **_gain(first, row, "gain")) for row in rows]
    steps = [replace(row, **_gain(before, row, "step")) for before, row in pairwise(found)]
    return [found[0], *steps]


def table(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """The content of `eval.json`: the rows without single answers, and the largest number of samples."""
    plain = []
    for row in rows:
        fields = asdict(row)
        del fields["scores"]
        fields["of_k"] = {name: {str(k): share for k, share in by_k.items()} for name, by_k in row.of_k.items()}
        plain.append(fields)
    return {"rows": plain, "k": max((row.samples for row in rows), default=0)}


def _gain(first: EvalRow, row: EvalRow, name: str) -> dict[str, Any]:
    """The fields of a paired gain."""
    both = [task for task in first.scores if task in row.scores]
    if not both:
        raise ValueError(f"{first.label!r} and {row.label!r} have no scored task in common, so no gain can be given")
    before, after = [first.scores[task] for task in both], [row.scores[task] for task in both]
    gain, p = paired_interval(before, after), sign_flip_p(differences(before, after))
    found = {name: gain.mean, f"{name}_low": gain.low, f"{name}_high": gain.high, f"{name}_p": p}
    return found | ({"detectable": detectable_gain(before, after)} if name == "gain" else {})


def _mean_rewards(answers: Sequence[SampledAnswer]) -> dict[str, float]:
    given: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.rewards.items():
            if value is not None:
                given.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in given.items()}


Rule = Callable[[Sequence[SampledAnswer], int], float]


def _of_k(
    scored: Mapping[str, Sequence[SampledAnswer]], samples: int, choosers: Sequence[str]
) -> dict[str, dict[int, float]]:
    """By each rule that is more than one answer: two answers have no majority."""
    rules: dict[str, tuple[Rule, int]] = {"pass": (_any_right, 1)}
    if any(answer.vote is not None for kept in scored.values() for answer in kept):
        rules["maj"] = (_by_majority, 3)
    rules |= {f"best {name}": (partial(_by_reward, name), 2) for name in choosers}
    ks = sorted({*(1 << exponent for exponent in range(samples.bit_length())), samples})
    return {
        name: {k: float(np.mean([rule(s, k) for s in scored.values() if len(s) >= k])) for k in ks if k >= least}
        for name, (rule, least) in rules.items()
    }


def _any_right(answers: Sequence[SampledAnswer], k: int) -> float:
    return pass_at_k(right=sum(bool(answer.correct) for answer in answers), samples=len(answers), k=k)


def _by_majority(answers: Sequence[SampledAnswer], k: int) -> float:
    """The chance that each vote wins, times the share of its answers that are right: 0 or 1 but where texts mislead."""
    votes, chance = [answer.vote for answer in answers], 0.0
    for vote in sorted({answer.vote for answer in answers if answer.correct and answer.vote is not None}):
        share = np.mean([bool(answer.correct) for answer in answers if answer.vote == vote])
        chance += maj_at_k(votes, vote, k) * float(share)
    return chance


def _by_reward(name: str, answers: Sequence[SampledAnswer], k: int) -> float:
    """One that it did not grade comes last."""
    given = [answer.rewards.get(name) for answer in answers]
    scores = [-math.inf if value is None else value for value in given]
    return best_of_k([float(bool(answer.correct)) for answer in answers], scores, k)


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
