"""Reward models: formulas by hand, their gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whet.formulas import reward
from whet.formulas.aggregate import STEPS, pessimistic


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_bradley_terry_by_hand() -> None:
    # d = (1, 0.5 - 2, -800): log(1 + e^-1), and no overflow where the order is badly wrong
    found = reward.bradley_terry(vector(1, 0.5, -400), vector(0, 0, 400), margin_P=vector(0, 2, 0), confidence_P=1.0)
    torch.testing.assert_close(found, vector(0.3132616875182228, 1.7014132779827524, 800))


def test_a_label_of_one_half_teaches_that_both_are_equal() -> None:
    at_zero = reward.bradley_terry(vector(0.3), vector(0.3), margin_P=0.0, confidence_P=0.5)
    torch.testing.assert_close(at_zero, vector(math.log(2)))
    d = 0.7  # soft label 0.8: -0.8 log sigmoid(d) - 0.2 log sigmoid(-d)
    soft = reward.bradley_terry(vector(d), vector(0), margin_P=0.0, confidence_P=0.8)
    torch.testing.assert_close(soft, vector(-0.8 * log_sigmoid(d) - 0.2 * log_sigmoid(-d)))


def test_centring_by_hand() -> None:
    torch.testing.assert_close(reward.centring(vector(1, 2), vector(-1, 3)), vector(0, 25))


def test_plackett_luce_by_hand() -> None:
    # Scores log 3, log 2, log 1: p(ranking) = 3/6 * 2/3 * 1/1
    places = reward.plackett_luce(vector(math.log(3), math.log(2), 0))
    torch.testing.assert_close(places, vector(math.log(2), math.log(1.5), 0))


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    better, worse = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    pairs = [reward.plackett_luce(torch.stack(pair)).sum() for pair in zip(better, worse, strict=True)]
    torch.testing.assert_close(torch.stack(pairs), reward.bradley_terry(better, worse, margin_P=0.0, confidence_P=1.0))


def test_probabilities_of_all_rankings_sum_to_one() -> None:
    scores = vector(0.3, -1.2, 2.0)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    total = sum(math.exp(-float(reward.plackett_luce(scores[list(order)]).sum())) for order in orders)
    assert total == pytest.approx(1)


def test_label_loss_by_hand() -> None:
    # log(1 + e^-2), log(1 + e^2), and the soft label's mixture of both
    found = reward.label_loss(vector(2, 2, 2), vector(1, 0, 0.25))
    right, wrong = -log_sigmoid(2), -log_sigmoid(-2)
    torch.testing.assert_close(found, vector(right, wrong, 0.25 * right + 0.75 * wrong))
    assert float(reward.label_loss(vector(-700.0), vector(1.0))) == pytest.approx(700)


def test_all_pairs_of_four() -> None:
    better, worse = reward.all_pairs(4)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs": lambda x: reward.bradley_terry(x[:3], x[3:], margin_P=vector(0, 0.5, 1), confidence_P=vector(1, 0.9, 0.4)),
    "centring": lambda x: reward.centring(x[:3], x[3:]),
    "ranking": reward.plackett_luce,
    "labels": lambda x: reward.label_loss(x, vector(0, 1, 0.3, 1, 0, 0.5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (scores,))


@pytest.mark.parametrize(("how", "one"), [("min", 0.5), ("product", 0.36), ("last", 0.8), ("mean", 2.2 / 3)])
def test_steps_become_one_number(how: str, one: float) -> None:
    assert STEPS[how]([0.9, 0.5, 0.8]) == pytest.approx(one)


def test_models_that_disagree_are_trusted_less() -> None:
    assert pessimistic([1.0, 1.0], spread=2.0) == 1.0
    assert pessimistic([0.0, 2.0], spread=0.5) == pytest.approx(0.5)  # mean 1, std 1
    assert pessimistic([0.0, 2.0], spread=0.0) == 1.0
