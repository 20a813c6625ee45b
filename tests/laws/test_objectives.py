"""Several rewards: normalised one by one, by hand and against what their plain sum loses."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from tests.laws.test_formulas import advantages, answers, vector
from whet.formulas.step import EPS, normalised_sum

CORNERS = list(itertools.product((0.0, 1.0), repeat=2))
"""Every combination of two binary rewards."""


def decoupled(values: list[tuple[float, ...]], groups: list[int], weights: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    return normalised_sum(torch.tensor(values, dtype=torch.float64), vector(*weights), torch.tensor(groups))


def test_objectives_are_normalised_one_by_one_by_hand() -> None:
    """Group 0: 1, 0 and 2, 6; group 1: equal in the first objective, and one answer alone has the second."""
    found = decoupled([(1, 2), (0, 6), (3, 5), (3, math.nan)], [0, 0, 1, 1], (1.0, 0.5))
    first, second = 0.5 / (math.sqrt(0.5) + EPS), 0.5 * 2 / (math.sqrt(8) + EPS)
    torch.testing.assert_close(found, vector(first - second, second - first, 0, 0))


def test_gdpo_by_hand() -> None:
    """Each reward is 1/2 from its mean at a std of sqrt(1/3); their sums are then divided by the std of the step."""
    total_N = decoupled(CORNERS, [0, 0, 0, 0])
    half = 0.5 / (math.sqrt(1 / 3) + EPS)
    torch.testing.assert_close(total_N, vector(-2 * half, 0, 0, 2 * half))
    given = advantages(answers(total_N.tolist(), [0] * 4, [1] * 4), "group_mean", "batch_std")
    torch.testing.assert_close(given, vector(-2 * half, 0, 0, 2 * half) / (math.sqrt(8 * half**2 / 3) + EPS))


def test_gdpo_keeps_apart_what_grpo_collapses() -> None:
    """Two answers with two binary rewards: to be better in both is worth more than to be better in one."""
    grpo, gdpo = {}, {}
    for pair in itertools.product(CORNERS, repeat=2):
        lead = sum(pair[0]) - sum(pair[1])
        summed = answers([sum(corner) for corner in pair], [0, 0], [1, 1])
        grpo.setdefault(lead, set()).add(round(float(advantages(summed, "group_mean", "group_std")[0]), 4))
        gdpo.setdefault(lead, set()).add(round(float(decoupled(list(pair), [0, 0])[0]), 4))
    assert grpo == {-2: {-0.7071}, -1: {-0.7071}, 0: {0}, 1: {0.7071}, 2: {0.7071}}
    assert gdpo == {-2: {-1.4142}, -1: {-0.7071}, 0: {0}, 1: {0.7071}, 2: {1.4142}}


def test_no_objective_is_louder_for_its_unit() -> None:
    values, groups = [(1, 0.2), (0, 0.9), (1, 0.4), (0, 0.1), (1, 0.3)], [0, 0, 0, 1, 1]
    scaled = [(first, 1000 * second - 7) for first, second in values]
    torch.testing.assert_close(decoupled(scaled, groups), decoupled(values, groups), rtol=1e-4, atol=0)
