"""Held-out quality of a reward model or a judge: accuracy with intervals, calibration, and baselines.

The unit is the prompt: pairs of one prompt resemble each other, so they are averaged before an interval is taken
(`evals.stats`). A reward model's tie is no win. A judge may call a tie, and does where its two orders disagree: that is
half a win, so that every coin has one half. "The longer one is better" is the rule that both must beat.

Ratings by several objectives are measured by explained variance: 1 is perfect, 0 is what the mean rating of the
training data has, a constant; below 0 it is worse than that. Beside it stands how ratings, and scores, correlate
with the answers' length: a model may have learnt nothing else.

Legend: A answers to one prompt, the best first; K objectives, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean

import numpy as np

from whet.evals.stats import Interval, explained_variance, mean_interval, paired_interval

BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One comparison as it was scored."""

    prompt: Hashable
    """What clusters: comparisons of one prompt are one question."""
    scores: tuple[float, ...]
    """Raw scores, the best answer's first."""
    lengths: tuple[int, ...]
    """Tokens of the answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """Two answers of which the first is known to be the better one, as they were judged."""

    prompt: Hashable
    chance: float
    """How likely it is, as was judged, that the first is the better one; one half is a tie."""
    lengths: tuple[int, int]
    """In any unit that is the same for both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """One labelled token as it was scored."""

    prompt: Hashable
    score: float
    """Raw: the log-odds that it is right."""
    label: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Judgements that the model was about equally sure of."""

    low: float
    high: float
    count: int
    confidence: float
    """Their mean confidence, from one half (undecided) to 1."""
    right: float
    """The share of them that is right; equal to the confidence where the model is calibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another way to decide the same pairs."""

    accuracy: Interval
    gain: Interval
    """Of the model over it, prompt by prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Figures of a reward model or a judge on data with known labels."""

    what: str
    """pairs or labels."""
    count: int
    accuracy: Interval
    ties: float
    """Share of the pairs (labels) that are not decided; the worth of each is the `tie` of `judge_pairs`."""
    baseline: Interval
    """Of "the longer answer is better" (equal lengths: half right), or of the more frequent label."""
    calibration_error: float
    """Expected calibration error: mean |confidence - share right| over bins, weighed by their counts."""
    bins: tuple[Bin, ...]
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    """What a gate must beat: its objectives without it."""


def judge_rankings(ranked: Sequence[Ranked]) -> Judgement:
    """All pairs of all comparisons by their scores; a tie is wrong. Raises `ValueError` where there is none."""
    pairs = [
        Decided(prompt=each.prompt, chance=_sigmoid(better - worse), lengths=(length, other))
        for each in ranked
        for (better, length), (worse, other) in combinations(zip(each.scores, each.lengths, strict=True), 2)
    ]
    return judge_pairs(pairs, tie=0.0)


def judge_pairs(pairs: Sequence[Decided], *, tie: float) -> Judgement:
    """Pairs that were decided one by one; a tie is worth `tie`. Raises `ValueError` where there is none."""
    right: dict[Hashable, list[float]] = {}
    longer: dict[Hashable, list[float]] = {}
    for pair in pairs:
        length, other = pair.lengths
        right.setdefault(pair.prompt, []).append(tie if pair.chance == 0.5 else float(pair.chance > 0.5))
        longer.setdefault(pair.prompt, []).append((length > other) + (length == other) / 2)
    sure = [(max(p.chance, 1 - p.chance), (p.chance > 0.5) + (p.chance == 0.5) / 2) for p in pairs]
    ties = sum(pair.chance == 0.5 for pair in pairs)
    return _judgement("pairs", list(right.values()), list(longer.values()), sure, ties)


def judge_rivals(ranked: Sequence[Ranked], others: Mapping[str, Sequence[tuple[float, ...]]]) -> Mapping[str, Rival]:
    """Other scores of the same answers, by name, and what the model's own gain over them."""

    def right(each: Sequence[Ranked]) -> list[list[float]]:
        found: dict[Hashable, list[float]] = {}
        for one in each:
            found.setdefault(one.prompt, []).extend(float(a > b) for a, b in combinations(one.scores, 2))
        return list(found.values())

    theirs = {
        name: right([replace(each, scores=other) for each, other in zip(ranked, scores, strict=True)])
        for name, scores in others.items()
    }
    return {
        name: Rival(accuracy=mean_interval(won), gain=paired_interval(won, right(ranked)))
        for name, won in theirs.items()
    }


def judge_labels(labelled: Sequence[Labelled]) -> Judgement:
    """All labelled tokens; a soft label counts as what it is nearer to. Raises `ValueError` where there is none."""
    right: dict[Hashable, list[float]] = {}
    usual: dict[Hashable, list[float]] = {}
    sure: list[tuple[float, float]] = []
    often = 2 * sum(each.label > 0.5 for each in labelled) >= len(labelled)
    for each in labelled:
        good = each.label > 0.5
        is_right = (each.score > 0) if good else (each.score < 0)
        right.setdefault(each.prompt, []).append(float(is_right))
        usual.setdefault(each.prompt, []).append(float(good == often))
        sure.append((_sigmoid(abs(each.score)), is_right + (each.score == 0) / 2))
    ties = sum(each.score == 0 for each in labelled)
    return _judgement("labels", list(right.values()), list(usual.values()), sure, ties)


def _judgement(
    what: str,
    right_QS: Sequence[Sequence[float]],
    baseline_QS: Sequence[Sequence[float]],
    sure: Sequence[tuple[float, float]],
    ties: int,
) -> Judgement:
    bins = reliability(sure)
    return Judgement(
        what=what,
        count=len(sure),
        accuracy=mean_interval(right_QS),
        ties=ties / len(sure),
        baseline=mean_interval(baseline_QS),
        calibration_error=sum(b.count * abs(b.confidence - b.right) for b in bins) / len(sure),
        bins=bins,
    )


def reliability(sure: Sequence[tuple[float, float]]) -> tuple[Bin, ...]:
    """(confidence, right) pairs in bins of equal width from one half to 1; empty bins are left out."""
    filled: dict[int, list[tuple[float, float]]] = {}
    for confidence, right in sure:
        filled.setdefault(min(BINS - 1, int((confidence - 0.5) * 2 * BINS)), []).append((confidence, right))
    return tuple(
        Bin(
            low=0.5 + place / (2 * BINS),
            high=0.5 + (place + 1) / (2 * BINS),
            count=len(pairs),
            confidence=fmean(confidence for confidence, _ in pairs),
            right=fmean(right for _, right in pairs),
        )
        for place, pairs in sorted(filled.items())
    )


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


ROUNDS = 30
RIDGE = 1e-3
"""Of the weights' squares, for a mixture under which every pair is right has no largest scale."""


def fixed_mixtures(said: Sequence[np.ndarray], names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Weights (K,) by a readable name, from the objectives' scores, (A, K) of each comparison.

    All alike, the one objective that is right most often, and the Bradley-Terry fit of free weights.
    """
    difference_PK = np.concatenate([[better - worse for better, worse in combinations(each, 2)] for each in said])
    best = int((difference_PK > 0).mean(0).argmax())
    alone = np.eye(len(names))[best]
    return {
        "all objectives alike": np.ones(len(names)),
        f"{names[best]} alone": alone,
        "the best fixed mixture": _fitted(difference_PK),
    }


def mixed(said: Sequence[np.ndarray], weight_K: np.ndarray) -> list[tuple[float, ...]]:
    """The scores of each comparison's answers under fixed weights."""
    return [tuple((each @ weight_K).tolist()) for each in said]


def _fitted(difference_PK: np.ndarray) -> np.ndarray:
    """The weights of the least Bradley-Terry loss, by Newton's method."""
    weight_K = np.zeros(difference_PK.shape[1])
    for _ in range(ROUNDS):
        right_P = 1 / (1 + np.exp(-(difference_PK @ weight_K)))
        gradient_K = difference_PK.T @ (right_P - 1) / len(difference_PK) + RIDGE * weight_K
        curvature_P = right_P * (1 - right_P)
        hessian_KK = (difference_PK.T * curvature_P) @ difference_PK / len(difference_PK)
        weight_K = weight_K - np.linalg.solve(hessian_KK + RIDGE * np.eye(len(weight_K)), gradient_K)
    return weight_K


# --------------------------------------------------------------------------- ratings, objective by objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One rating and what the model said. Both in standard deviations from the mean of the training data."""

    prompt: Hashable
    score: float
    rating: float
    length: int
    """Tokens of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveFit:
    """One objective on held-out data."""

    name: str
    count: int
    explained: Interval
    """Share of the variance around the training data's mean; that mean itself has 0."""
    correlation: float | None
    """Of scores with ratings; None where one of the two is constant."""
    length: float | None
    """Correlation of scores with lengths."""
    length_of_ratings: float | None
    """Correlation of the ratings themselves with lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratings:
    """The verdict on a model of several objectives."""

    what: str
    """ratings."""
    count: int
    objectives: tuple[ObjectiveFit, ...]
    """Those of which there is anything to explain among the held-out ratings."""


def judge_ratings(rated: Mapping[str, Sequence[Rating]]) -> Ratings:
    """All held-out ratings, by objective; an objective without ratings, or rated the mean throughout, is left out."""
    found = {name: given for name, given in rated.items() if any(each.rating for each in given)}
    return Ratings(
        what="ratings",
        count=sum(map(len, rated.values())),
        objectives=tuple(_objective(name, given) for name, given in found.items()),
    )


def _objective(name: str, given: Sequence[Rating]) -> ObjectiveFit:
    errors: dict[Hashable, float] = {}
    totals: dict[Hashable, float] = {}
    for each in given:
        errors[each.prompt] = errors.get(each.prompt, 0.0) + (each.rating - each.score) ** 2
        totals[each.prompt] = totals.get(each.prompt, 0.0) + each.rating**2
    scores, ratings = [each.score for each in given], [each.rating for each in given]
    lengths = [float(each.length) for each in given]
    return ObjectiveFit(
        name=name,
        count=len(given),
        explained=explained_variance(list(errors.values()), list(totals.values())),
        correlation=correlation(scores, ratings),
        length=correlation(scores, lengths),
        length_of_ratings=correlation(ratings, lengths),
    )


def correlation(left_N: Sequence[float], right_N: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    left, right = (np.asarray(values) - np.mean(values) for values in (left_N, right_N))
    spread = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / spread if spread > 0 else None
