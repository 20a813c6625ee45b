"""How good a reward model is: accuracy, baseline, calibration, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from whet.evals.judgement import (
    Decided,
    Labelled,
    Ranked,
    fixed_mixtures,
    judge_labels,
    judge_pairs,
    judge_rankings,
    judge_rivals,
    mixed,
    reliability,
)
from whet.evals.stats import wilson_interval


def test_a_tie_is_no_win_and_is_reported() -> None:
    found = judge_rankings(
        [
            Ranked(prompt="a", scores=(2.0, 1.0), lengths=(5, 9)),
            Ranked(prompt="b", scores=(1.0, 1.0), lengths=(9, 5)),
            Ranked(prompt="c", scores=(0.0, 1.0), lengths=(5, 5)),
            Ranked(prompt="d", scores=(3.0, 0.0), lengths=(9, 5)),
        ]
    )
    assert (found.count, found.accuracy.mean, found.ties) == (4, 0.5, 0.25)
    assert found.baseline.mean == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    assert found.accuracy == wilson_interval(right=2, questions=4)


def test_a_judge_that_cannot_decide_is_half_right() -> None:
    decided = [Decided(prompt=i, chance=chance, lengths=(2, 1)) for i, chance in enumerate((1.0, 0.5, 0.0, 0.5, 0.75))]
    found = judge_pairs(decided, tie=0.5)
    assert (found.count, found.accuracy.mean, found.ties, found.baseline.mean) == (5, 0.6, 0.4, 1.0)
    assert judge_pairs(decided, tie=0.0).accuracy.mean == pytest.approx(0.4)
    assert [(b.confidence, b.right) for b in found.bins] == [(0.5, 0.5), (0.75, 1.0), (1.0, 0.5)]


def test_scores_far_apart_are_certain() -> None:
    found = judge_rankings([Ranked(prompt="a", scores=(-2000.0, 2000.0), lengths=(1, 1))])
    assert (found.accuracy.mean, found.calibration_error) == (0.0, 1.0)


def test_pairs_of_one_prompt_are_one_question() -> None:
    """Three pairs of one prompt and one of another: the mean is over prompts, and so is the interval."""
    listed = [
        Ranked(prompt="a", scores=(3.0, 2.0, 1.0), lengths=(1, 1, 1)),
        Ranked(prompt="b", scores=(0.0, 1.0), lengths=(1, 1)),
    ]
    found = judge_rankings(listed)
    assert (found.count, found.accuracy.questions, found.accuracy.mean) == (4, 2, 0.5)
    split = [Ranked(prompt="a", scores=s, lengths=(1, 1)) for s in ((3.0, 2.0), (3.0, 1.0), (2.0, 1.0))]
    assert judge_rankings([*split, listed[1]]).accuracy == found.accuracy


def test_calibration_by_hand() -> None:
    # Confidence sigmoid(log 3) = 0.75, three of four right: calibrated. Confidence sigmoid(log 9) = 0.9, none right.
    sure = [Ranked(prompt=i, scores=(math.log(3), 0.0), lengths=(1, 1)) for i in range(3)]
    sure.append(Ranked(prompt=3, scores=(0.0, math.log(3)), lengths=(1, 1)))
    assert judge_rankings(sure).calibration_error == pytest.approx(0)
    wrong = Ranked(prompt=4, scores=(0.0, math.log(9)), lengths=(1, 1))
    found = judge_rankings([*sure, wrong])
    assert found.calibration_error == pytest.approx(0.9 / 5)
    assert [(b.count, b.right) for b in found.bins] == [(4, 0.75), (1, 0.0)]
    assert all(b.low <= b.confidence <= b.high + 1e-12 for b in found.bins)
    # Too modest by a quarter is as far off as too sure by a quarter.
    assert judge_rankings(sure[:3]).calibration_error == pytest.approx(0.25)


def test_bins_cover_one_half_to_one() -> None:
    assert [(b.low, b.high) for b in reliability([(0.5, 1.0), (1.0, 1.0)])] == [(0.5, 0.55), (0.95, 1.0)]


def test_labels_are_judged_against_the_more_frequent_one() -> None:
    given = [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)]
    found = judge_labels([Labelled(prompt=i, score=score, label=label) for i, (score, label) in enumerate(given)])
    assert (found.accuracy.mean, found.baseline.mean, found.ties) == (0.6, 0.6, 0.2)
    # How sure it is has no sign: those with 1 and -1 stand in one bin, two of three right; undecided is half right.
    assert [(b.count, b.right) for b in found.bins] == [(1, 0.5), (3, pytest.approx(2 / 3)), (1, 1.0)]
    # Where bad ones are as frequent or more, always-bad is the rule to beat.
    bad = judge_labels([Labelled(prompt=i, score=-1.0, label=float(i == 0)) for i in range(3)])
    assert bad.baseline.mean == bad.accuracy.mean == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------- what needs no gate


def test_the_best_fixed_mixture_is_the_one_that_made_the_data() -> None:
    """Pairs decided by a Bradley-Terry model with weights (2, -1, 0) over three objectives."""
    random = np.random.default_rng(5)
    said = []
    for _ in range(4000):
        pair = random.normal(size=(2, 3))
        log_odds = float((pair[0] - pair[1]) @ [2.0, -1.0, 0.0])
        said.append(pair if random.random() < 1 / (1 + math.exp(-log_odds)) else pair[::-1])
    found = fixed_mixtures(said, ("a", "b", "c"))
    assert list(found) == ["all objectives alike", "a alone", "the best fixed mixture"]
    np.testing.assert_allclose(found["the best fixed mixture"], [2.0, -1.0, 0.0], atol=0.15)
    separable = fixed_mixtures([np.array([[1.0, 0.0], [0.0, 0.0]])], ("a", "b"))
    assert np.isfinite(separable["the best fixed mixture"]).all(), "all pairs right, and no weight without end"


def test_the_one_objective_is_the_one_that_is_right_most_often() -> None:
    """Differences (5, 1), (-1, 1), (-1, -1): the first has the larger mean, the second is right in two of three."""
    said = [np.array([[5.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])]
    found = fixed_mixtures(said, ("a", "b"))
    assert found["b alone"].tolist() == [0.0, 1.0] and found["all objectives alike"].tolist() == [1.0, 1.0]
    assert mixed(said, np.array([2.0, -1.0])) == [(9.0, 0.0), (-1.0, 2.0), (0.0, 1.0)]


def test_rivals_by_hand() -> None:
    """Two prompts; the model is right in all three pairs, the other in one of the first prompt's two and in none."""
    ranked = [
        Ranked(prompt="p", scores=(2.0, 1.0), lengths=(1, 1)),
        Ranked(prompt="p", scores=(3.0, 1.0), lengths=(1, 1)),
        Ranked(prompt="q", scores=(0.0, -1.0), lengths=(1, 1)),
    ]
    other = judge_rivals(ranked, {"other": [(1.0, 0.0), (0.0, 1.0), (5.0, 5.0)]})["other"]
    assert other.accuracy.mean == pytest.approx(0.25), "the prompt is the unit, and a tie is wrong"
    assert other.gain.mean == pytest.approx(0.75) and other.gain.low < 0.75 < other.gain.high
