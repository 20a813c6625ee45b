"""Statistics of sampled answers: means, confidence intervals, and paired comparisons of two models.

The unit is the *question*. Samples of one question resemble each other, so counting them as independent makes
intervals far too narrow (Miller, "Adding Error Bars to Evals", 2411.00640). Every interval here first averages the
samples of a question, and every comparison of two models is made question by question.

Legend: Q questions, S samples of one question (its length may differ from question to question). Scores are in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

LEVEL, POWER = 0.95, 0.8
"""Of all intervals the confidence, and of the detectable gain the chance to show it."""
WILSON_BELOW = 100
"""Below this many questions with one sample each, the Student-t interval of a share covers too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    questions: int


# ------------------------------------------------------------------------------------ one model, k samples


def pass_at_k(*, right: int, samples: int, k: int) -> float:
    """Chance that at least one of k samples is right, for a question with `right` of `samples` right.

    1 - C(samples - right, k) / C(samples, k): unbiased, unlike 1 - (1 - right/samples)^k (Chen et al., Codex,
    2107.03374). The figure of a benchmark is its mean over questions. Raises `ValueError` where k > samples.
    """
    if not 0 <= right <= samples:
        raise ValueError(f"right must be between 0 and samples ({samples}), got {right}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the number of samples ({samples}), got {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def maj_at_k(answers_S: Sequence[str | None], gold: str, k: int) -> float:
    """Chance that the most frequent of k sampled answers is the gold one, exactly (self-consistency, 2203.11171).

    Answers must be normalised as `gold` is. None (no answer found) takes a place among the k but never votes. A tie
    goes to the answer that was seen first: as the k samples are drawn in random order, m tied answers win 1/m each.
    Counts all C(samples, k) subsets by their vote counts, class by class. Raises `ValueError` where k > samples.
    """
    samples = len(answers_S)
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the number of samples ({samples}), got {k}")
    others = Counter(answers_S)
    gold_count, silent = others.pop(gold, 0), others.pop(None, 0)
    won = Fraction(0)
    for votes in range(1, min(gold_count, k) + 1):
        # (samples taken beside the gold ones, answers with the winning count): number of subsets
        ways = {(taken, 1): math.comb(silent, taken) for taken in range(min(silent, k - votes) + 1)}
        for count in others.values():
            longer: Counter[tuple[int, int]] = Counter()
            for (taken, tied), subsets in ways.items():
                for more in range(min(count, votes, k - votes - taken) + 1):
                    longer[taken + more, tied + (more == votes)] += subsets * math.comb(count, more)
            ways = dict(longer)
        full = sum((Fraction(n, tied) for (taken, tied), n in ways.items() if taken == k - votes), Fraction(0))
        won += math.comb(gold_count, votes) * full
    return float(won / math.comb(samples, k))


def best_of_k(right_S: Sequence[float], scores_S: Sequence[float], k: int) -> float:
    """Chance that the highest-scored of k of the samples is right, exactly; equal scores draw lots.

    Raises `ValueError` where k > samples.
    """
    samples, chance = len(scores_S), Fraction(0)
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the number of samples ({samples}), got {k}")
    for score in set(scores_S):
        equal = [right for right, other in zip(right_S, scores_S, strict=True) if other == score]
        below = sum(other < score for other in scores_S)
        won = math.comb(below + len(equal), k) - math.comb(below, k)
        chance += won * Fraction(float(np.mean(equal)))
    return float(chance / math.comb(samples, k))


# --------------------------------------------------------------------------------------------- how sure


def mean_interval(scores_QS: Sequence[Sequence[float]]) -> Interval:
    """Interval of the mean score over questions: clustered Student-t, or Wilson for few single samples.

    The samples of a question are averaged first; the questions' means are then independent, and their mean has
    Student's t interval with Q - 1 degrees of freedom, cut to [0, 1] (2411.00640, section 2.2). With one right-or-wrong
    sample per question and fewer than 100 questions it is Wilson's score interval instead. Where all but a handful of
    questions are wholly right or wholly wrong, the t interval is too narrow: a few questions carry all the spread.
    """
    means_Q = _question_means(scores_QS)
    single = all(len(scores_S) == 1 for scores_S in scores_QS)
    if single and len(means_Q) < WILSON_BELOW and bool(np.isin(means_Q, (0.0, 1.0)).all()):
        return wilson_interval(right=int(means_Q.sum()), questions=len(means_Q))
    return _t_interval(means_Q, floor=0.0)


def paired_interval(first_QS: Sequence[Sequence[float]], second_QS: Sequence[Sequence[float]]) -> Interval:
    """Interval of the gain, second minus first, of two models on the *same* questions in the same order.

    Student-t over the questions' differences: what makes a question hard for both cancels (2411.00640, section 4.2).
    The two may have different numbers of samples. Raises `ValueError` where the numbers of questions differ.
    """
    return _t_interval(differences(first_QS, second_QS), floor=-1.0)


def detectable_gain(first_QS: Sequence[Sequence[float]], second_QS: Sequence[Sequence[float]]) -> float:
    """The smallest true gain that such a comparison shows to be one four times of five (minimum detectable effect).

    Half the paired interval and Student's t of the power, in standard errors of the mean difference (2411.00640,
    section 5), which are taken from these questions.
    """
    values_Q = differences(first_QS, second_QS)
    degrees = max(1, len(values_Q) - 1)
    return _half_width(values_Q) * (1 + t_quantile(2 * POWER - 1, degrees) / t_quantile(LEVEL, degrees))


def explained_variance(errors_Q: Sequence[float], totals_Q: Sequence[float]) -> Interval:
    """Interval of 1 - sum(errors) / sum(totals): squared errors of a model and of a constant, summed by question.

    Raises `ZeroDivisionError` where there is nothing to explain.
    """
    return _t_interval(1 - _linearised(errors_Q, totals_Q), floor=-math.inf)


def ratio_interval(sums_Q: Sequence[float], counts_Q: Sequence[float]) -> Interval:
    """Interval of sum(sums) / sum(counts): a mean over tokens whose unit is the question (or the row)."""
    return _t_interval(_linearised(sums_Q, counts_Q), floor=-math.inf, ceiling=math.inf)


def runs_interval(values: Sequence[float]) -> Interval:
    """Student-t interval of the mean of a figure over independent runs (seeds)."""
    return _t_interval(np.array(values), floor=-math.inf, ceiling=math.inf)


def _linearised(sums_Q: Sequence[float], counts_Q: Sequence[float]) -> np.ndarray:
    """Values whose mean is the ratio of the sums, and whose spread is its (Cochran, Sampling Techniques, 6.4)."""
    sums, counts = np.array(sums_Q, np.float64), np.array(counts_Q, np.float64)
    ratio = float(sums.sum()) / float(counts.sum())
    return ratio + (sums - ratio * counts) / counts.mean()


def sign_flip_p(differences_Q: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of "there is no difference": how often random signs give a sum this far from zero.

    Exact for any number of questions: the differences are multiples of 1/q, so the distribution of their signed sum
    is a convolution over integers (Pagano & Tritchler 1983). Where q would exceed 1000 (uneven numbers of samples)
    differences are rounded to thousandths. For one right-or-wrong sample each this is McNemar's exact test.
    """
    fractions_Q = [Fraction(float(d)).limit_denominator(1000) for d in differences_Q]
    q = min(math.lcm(*(fraction.denominator for fraction in fractions_Q)), 1000)
    steps_Q = [round(fraction * q) for fraction in fractions_Q]
    reach = sum(abs(step) for step in steps_Q)
    chance = np.zeros(2 * reach + 1)  # index i: the sum is i - reach
    chance[reach] = 1.0
    for step in (abs(step) for step in steps_Q if step):
        chance = (np.roll(chance, step) + np.roll(chance, -step)) / 2  # nothing wraps: reach is the sum of all steps
    seen = abs(sum(steps_Q))
    return min(1.0, float(chance[: reach - seen + 1].sum() + chance[reach + seen :].sum()))


def wilson_interval(*, right: int, questions: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): good for few questions and at 0 % and 100 %."""
    if questions < 1:
        raise ValueError("an interval needs at least one question")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = right / questions
    scale = 1 + z * z / questions
    centre = (share + z * z / (2 * questions)) / scale
    half = z * math.sqrt(share * (1 - share) / questions + z * z / (4 * questions**2)) / scale
    return Interval(mean=share, low=max(0.0, centre - half), high=min(1.0, centre + half), questions=questions)


def differences(first_QS: Sequence[Sequence[float]], second_QS: Sequence[Sequence[float]]) -> np.ndarray:
    """Second minus first, question by question, samples averaged."""
    if len(first_QS) != len(second_QS):
        raise ValueError(f"a paired comparison needs the same questions, got {len(first_QS)} and {len(second_QS)}")
    return _question_means(second_QS) - _question_means(first_QS)


def t_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| < t) = level, for whole degrees of freedom.

    Bisection of the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4, with theta = atan(t / sqrt(degrees)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _t_inside(theta, degrees) < level else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


# ---------------------------------------------------------------------------------------------- helpers


def _question_means(scores_QS: Sequence[Sequence[float]]) -> np.ndarray:
    if not scores_QS or not all(len(scores_S) for scores_S in scores_QS):
        raise ValueError("every question needs at least one scored sample, and there must be a question")
    return np.array([np.mean(scores_S) for scores_S in scores_QS])


def _t_interval(values_Q: np.ndarray, *, floor: float, ceiling: float = 1.0) -> Interval:
    """Student-t, cut to [floor, ceiling]."""
    count, mean = len(values_Q), float(values_Q.mean())
    half = _half_width(values_Q, bounded=not math.isinf(ceiling))
    return Interval(mean=mean, low=max(floor, mean - half), high=min(ceiling, mean + half), questions=count)


def _half_width(values_Q: np.ndarray, *, bounded: bool = True) -> float:
    """Of Student's t interval of a mean. Where all values of a bounded figure are equal their spread says nothing about
    the next question; it is then what Wilson leaves for an event that Q questions never showed."""
    count = len(values_Q)
    if np.ptp(values_Q) > 1e-12 or not bounded:
        return t_quantile(LEVEL, count - 1) * float(values_Q.std(ddof=1)) / math.sqrt(count)
    return wilson_interval(right=0, questions=count).high


def _t_inside(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(theta)) for T with that many degrees of freedom."""
    cosine = math.cos(theta)
    if degrees % 2:
        orders = np.arange(3, degrees, 2)
        terms = cosine * np.concatenate([[1.0], np.cumprod((orders - 1) / orders * cosine**2)])
        series = float(terms.sum()) if degrees > 1 else 0.0
        return 2 / math.pi * (theta + math.sin(theta) * series)
    orders = np.arange(2, degrees, 2)
    return math.sin(theta) * float(np.concatenate([[1.0], np.cumprod((orders - 1) / orders * cosine**2)]).sum())
