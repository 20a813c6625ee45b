"""Statistics against numbers that anyone can recompute, and one coverage simulation."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from whet.evals.run import SampledAnswer, compare, summarise, table
from whet.evals.stats import (
    best_of_k,
    detectable_gain,
    maj_at_k,
    mean_interval,
    paired_interval,
    pass_at_k,
    ratio_interval,
    runs_interval,
    sign_flip_p,
    t_quantile,
    wilson_interval,
)

# ------------------------------------------------------------------------------------------ one model


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for samples, right, k in [(5, 2, 3), (6, 1, 2), (4, 0, 4), (4, 4, 1), (6, 5, 2)]:
        marks = [True] * right + [False] * (samples - right)
        subsets = list(itertools.combinations(marks, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(right=right, samples=samples, k=k) == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(right=2, samples=5, k=3) == pytest.approx(0.9)  # 1 - C(3,3)/C(5,3) = 1 - 1/10


def test_pass_at_1_is_the_share_right_and_pass_at_k_never_falls() -> None:
    assert pass_at_k(right=3, samples=8, k=1) == pytest.approx(3 / 8)
    curve = [pass_at_k(right=2, samples=8, k=k) for k in range(1, 9)]
    assert curve == sorted(curve) and curve[-1] == 1


def test_k_beyond_the_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be between 1 and the number of samples"):
        pass_at_k(right=1, samples=4, k=5)
    with pytest.raises(ValueError, match="k must be between 1 and the number of samples"):
        maj_at_k(["1"], "1", 2)


def first_seen_majority(drawn: tuple[str | None, ...]) -> str | None:
    votes = [answer for answer in drawn if answer is not None]
    return max(votes, key=votes.count) if votes else None  # max keeps the first of equals


@pytest.mark.parametrize(
    "answers",
    [
        ["7", "7", "8", "9", None, "8"],
        ["8", "7", "8", "7", "7", None],
        [None, None, "7", "8", "9", "1"],
        ["8", "8", None, "9", "9", "8"],
    ],
)
def test_maj_at_k_is_the_mean_over_all_ordered_draws(answers: list[str | None]) -> None:
    for k in range(1, 7):
        draws = list(itertools.permutations(answers, k))
        expected = sum(first_seen_majority(draw) == "7" for draw in draws) / len(draws)
        assert maj_at_k(answers, "7", k) == pytest.approx(expected, abs=1e-12)


def test_an_unanswered_sample_never_votes() -> None:
    assert maj_at_k([None, None, None, "7"], "7", 4) == 1.0
    assert maj_at_k([None, None], "7", 2) == 0.0


def test_questions_are_weighed_not_samples() -> None:
    assert mean_interval([[1], [0, 0, 0]]).mean == 0.5


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_best_of_k_is_the_mean_over_all_subsets(k: int) -> None:
    """Of equal scores each is as likely to be taken; where the score is the truth it is pass@k."""
    right, scores = [1.0, 0.0, 1.0, 0.0, 0.0], [0.3, 0.9, 0.9, 0.1, -math.inf]
    means = []
    for subset in itertools.combinations(range(5), k):
        top = max(scores[place] for place in subset)
        means.append(np.mean([right[place] for place in subset if scores[place] == top]))
    assert best_of_k(right, scores, k) == pytest.approx(np.mean(means), abs=1e-12)
    assert best_of_k(right, right, k) == pytest.approx(pass_at_k(right=2, samples=5, k=k), abs=1e-12)


# ------------------------------------------------------------------------------------------- how sure


def test_t_quantiles_are_those_of_the_printed_table() -> None:
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 31: 2.040, 120: 1.980}
    for degrees, value in printed.items():
        assert t_quantile(0.95, degrees) == pytest.approx(value, abs=5e-4)
    assert t_quantile(0.99, 10) == pytest.approx(3.169, abs=5e-4)
    assert t_quantile(0.95, 20_000) == pytest.approx(1.9600, abs=2e-4)


def test_wilson_on_aime_is_the_known_interval() -> None:
    interval = wilson_interval(right=18, questions=30)  # 60 % of 30: 42 to 75 %
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.423, 0.754)
    assert mean_interval([[1.0]] * 18 + [[0.0]] * 12) == interval


def test_interval_of_three_questions_by_hand() -> None:
    # Means 0.5, 1.0, 0.0: mean 0.5, sd 0.5, t(2) = 4.303, half = 4.303 * 0.5 / sqrt(3) = 1.242, cut to [0, 1].
    assert mean_interval([[1, 0], [1, 1], [0, 0]]).low == 0.0
    # Means 0.25 ... 0.75 of five questions: mean 0.5, sd 0.17678, t(4) = 2.7764, half = 0.21951.
    scores = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    interval = mean_interval(scores)
    assert interval.mean == 0.5
    assert interval.high - 0.5 == pytest.approx(2.7764 * 0.176777 / math.sqrt(5), abs=1e-4)


def test_repeating_a_question_s_samples_teaches_nothing() -> None:
    once = mean_interval([[q % 3 == 0, q % 2 == 0] for q in range(40)])
    assert mean_interval([[q % 3 == 0, q % 2 == 0] * 50 for q in range(40)]) == once


def test_perfect_scores_still_have_an_interval() -> None:
    interval = mean_interval([[1, 1]] * 20)
    assert interval.high == 1 and interval.low == pytest.approx(wilson_interval(right=20, questions=20).low)
    no_change = paired_interval([[1, 1]] * 20, [[1, 1]] * 20)
    assert no_change.low < 0 < no_change.high


def test_clustered_interval_covers_what_it_says_and_the_naive_one_does_not() -> None:
    rng = np.random.default_rng(0)
    questions, samples, trials = 60, 8, 1500
    covered = naive = 0
    for _ in range(trials):
        solve_rates = rng.beta(0.6, 0.9, size=questions)  # true mean 0.4
        right = rng.random((questions, samples)) < solve_rates[:, None]
        interval = mean_interval(right.astype(float).tolist())
        covered += interval.low <= 0.4 <= interval.high
        share = right.mean()
        naive += abs(share - 0.4) <= 1.96 * math.sqrt(share * (1 - share) / right.size)
    assert 0.935 <= covered / trials <= 0.965
    assert naive / trials < 0.75


def test_pairing_by_question_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    rates = rng.beta(0.6, 0.6, size=100)
    before = (rng.random((100, 8)) < rates[:, None] * 0.9).astype(float).tolist()
    after = (rng.random((100, 8)) < rates[:, None]).astype(float).tolist()
    gain, one = paired_interval(before, after), mean_interval(before)
    assert gain.low > 0 and gain.high - gain.low < 0.6 * (one.high - one.low)
    assert gain.mean == pytest.approx(mean_interval(after).mean - mean_interval(before).mean)


def test_a_gain_of_the_detectable_size_is_seen_four_times_of_five() -> None:
    draw, seen, least = np.random.default_rng(0), 0, 0.09
    for _ in range(400):
        hard = draw.random(200)
        before, after = ((draw.random((4, 200)) < hard * 0.8 + more).T.astype(float) for more in (0.0, 0.09))
        seen += paired_interval(before.tolist(), after.tolist()).low > 0
        least = detectable_gain(before.tolist(), after.tolist())
    # With the gain as large as this it would be 0.8; the power of Student's t for a gain of this ratio is known.
    expected = NormalDist().cdf(0.09 / least * (1.96 + 0.84) - 1.96)
    assert seen / 400 == pytest.approx(expected, abs=0.06) and 0.05 < least < 0.13
    assert detectable_gain([[1.0]] * 20, [[1.0]] * 20) > 0.2, "equal answers are no proof"


def test_sign_flip_is_exact() -> None:
    assert sign_flip_p([1.0] * 5) == pytest.approx(2 / 32)
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([1, 1, 1, -1, 0, 0]) == pytest.approx(10 / 16)  # McNemar, 3 against 1: 2 * (4 + 1) / 16
    values = [0.25, -1 / 3, 0.5, 0.75, 1 / 3, 0.125]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    assert sign_flip_p(values) == pytest.approx(sum(s >= abs(sum(values)) - 1e-9 for s in sums) / 64)


def test_sign_flip_with_thousands_of_questions_matches_the_normal_law() -> None:
    signs = [1.0] * 1040 + [-1.0] * 960
    z = (80 - 1) / math.sqrt(2000)  # with the correction for whole numbers
    assert sign_flip_p(signs) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


# -------------------------------------------------------------------------------------------- the rows


def answers(*marks: bool | None, tokens: int = 10) -> list[SampledAnswer]:
    """Right ones have shown their working; `other` never applies."""
    return [
        SampledAnswer(
            correct=mark, tokens=tokens, truncated=mark is False, rewards={"worked": float(bool(mark)), "other": None}
        )
        for mark in marks
    ]


def test_unscored_answers_are_left_out_and_counted() -> None:
    row = summarise("base", {"a": answers(True, None), "b": answers(False, True), "c": answers(None, None)})
    assert (row.tasks, row.unscored, row.samples) == (2, 3, 2)
    assert row.accuracy == 0.75 and row.truncated == pytest.approx(1 / 3)
    assert row.rewards == {"worked": 2 / 3}, "over the three graded answers, and not where it does not apply"
    assert row.of_k == {"pass": {1: 0.75, 2: 1.0}}  # pass@2 from the one task with two scored answers
    with pytest.raises(ValueError, match="no answer of 'base' could be graded"):
        summarise("base", {"a": answers(None)})


def test_what_several_answers_come_to() -> None:
    """One question: 7 is right, said twice of five times, and once in words that read as 8; the reward likes a 9."""
    said = [("7", True, 0.5), ("7", True, 0.1), ("8", False, 0.2), ("8", True, None), ("9", False, 0.9)]
    given = [
        SampledAnswer(correct=correct, tokens=1, truncated=False, rewards={"pref": value}, vote=vote)
        for vote, correct, value in said
    ]
    row = summarise("base", {"a": given}, ["pref"])
    assert {name: list(by_k) for name, by_k in row.of_k.items()} == {
        "pass": [1, 2, 4, 5],
        "maj": [4, 5],
        "best pref": [2, 4, 5],
    }
    assert row.of_k["maj"][5] == pytest.approx((1 + 0.5) / 2), "7 and 8 tie, and half of what says 8 is right"
    assert row.of_k["best pref"][5] == 0 and row.of_k["best pref"][2] == pytest.approx(0.4)
    unread = [SampledAnswer(correct=True, tokens=1, truncated=False, rewards={})] * 4
    assert list(summarise("base", {"a": unread}).of_k) == ["pass"], "where nobody votes there is no majority"


def test_gain_is_paired_by_task_whatever_the_order() -> None:
    base = summarise("base", {f"t{i}": answers(i % 2 == 0, False) for i in range(20)})
    tuned = summarise("rl", {f"t{i}": answers(i % 2 == 0, True, tokens=20) for i in reversed(range(20))})
    first, second = compare([base, tuned])
    assert first.gain is None
    assert second.gain == second.gain_low + (second.gain_high - second.gain_low) / 2 == 0.5
    assert second.gain_p == pytest.approx(2 / 2**20)
    last = summarise("dpo", {f"t{i}": answers(True, True) for i in range(20)})
    *_, third = compare([base, tuned, last])
    assert (third.gain, third.step, second.step) == (0.75, 0.25, 0.5), "over the first row, and over the one before"
    with pytest.raises(ValueError, match="no scored task in common"):
        compare([base, summarise("other", {"x": answers(True)})])


def test_eval_json_has_the_agreed_keys() -> None:
    rows = compare([summarise("base", {"a": answers(True, False)}), summarise("rl", {"a": answers(True, True)})])
    written = table(rows)
    assert written["k"] == 2
    assert written["rows"][1]["of_k"] == {"pass": {"1": 1.0, "2": 1.0}}
    assert {"label", "accuracy", "low", "high", "mean_length", "truncated", "gain", "gain_low", "gain_high", "samples",
            "tasks"} <= written["rows"][0].keys()  # fmt: skip


def test_a_ratio_and_a_mean_over_runs_by_hand() -> None:
    """Rows of 1 and 1 tokens with 1 and 3 nats: 2 nats, plus and minus t(0.975, 1) x sqrt(2) / sqrt(2) = 12.706."""
    at = ratio_interval([1.0, 3.0], [1, 1])
    assert (at.mean, at.high, at.low) == pytest.approx((2.0, 14.706, -10.706), abs=1e-3)
    assert ratio_interval([2.0, 4.0], [1, 2]).high == 2.0, "every token costs the same"
    assert ratio_interval([1.0, 9.0], [1, 3]).mean == 2.5, "a mean over tokens, not over rows"
    seeds = runs_interval([1.0, 3.0])
    assert (seeds.mean, seeds.high) == pytest.approx((2.0, 14.706), abs=1e-3)
