"""Laws 3 and 4: formulas against numbers that anyone can recompute, and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from whet.config import PolicyConfig
from whet.formulas import kl, policy
from whet.formulas.advantages import BASELINES, EPS, SCALES, group_advantage, group_mean, group_std, leave_one_out, no_scale
from whet.formulas.logprobs import chunked_logp, entropy, token_logp
from whet.formulas.reduce import REDUCTIONS, sequence_mean, sequence_sum_over_constant, token_mean

CLIPPED = partial(policy.clipped_surrogate, low=0.2, high=0.28)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_clipped_surrogate_by_hand() -> None:
    ratio, advantage = vector(0.5, 0.5, 1.5, 1.5, 1.1), vector(1, -1, 1, -1, 2)
    loss = CLIPPED(ratio.log(), torch.zeros(5, dtype=torch.float64), advantage)
    torch.testing.assert_close(loss, vector(-0.5, 0.8, -1.28, 1.5, -2.2))


def test_clip_fractions_count_the_active_side_only() -> None:
    ratio, advantage = vector(0.5, 0.5, 1.5, 1.5), vector(1, -1, 1, -1)
    old = torch.zeros(4, dtype=torch.float64)
    assert policy.clipped_low(ratio.log(), old, advantage, low=0.2).tolist() == [0, 1, 0, 0]
    assert policy.clipped_high(ratio.log(), old, advantage, high=0.28).tolist() == [0, 0, 1, 0]


def test_on_policy_the_clip_is_invisible() -> None:
    logp, advantage = torch.randn(64, dtype=torch.float64, requires_grad=True), torch.randn(64, dtype=torch.float64)
    CLIPPED(logp, logp.detach(), advantage).sum().backward()
    torch.testing.assert_close(logp.grad, -advantage)


def test_kl_estimators_by_hand() -> None:
    logp, ref = vector(-1.0, -2.0), vector(-2.0, -1.0)
    torch.testing.assert_close(kl.k1(logp, ref), vector(1, -1))
    torch.testing.assert_close(kl.k2(logp, ref), vector(0.5, 0.5))
    torch.testing.assert_close(kl.k3(logp, ref), vector(math.exp(-1), math.e - 2))


def test_k1_and_k3_are_unbiased_and_k2_has_the_right_gradient() -> None:
    """By enumeration of a four-way categorical."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.2, 0.4, 0.1, 0.3], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    p = logp.exp().detach()
    for estimate in (kl.k1, kl.k3):
        torch.testing.assert_close((p * estimate(logp, ref)).sum(), exact)
    (true_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad((p * kl.k2(logp, ref)).sum(), logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad((p * kl.k1(logp, ref)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(of_k2, true_gradient)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1))


def test_advantages_by_hand() -> None:
    rewards = vector(1, 0, 0, 1, 0)
    mean, std = 0.4, math.sqrt(0.3)
    torch.testing.assert_close(
        group_advantage(rewards, baseline=group_mean, scale=group_std), (rewards - mean) / (std + EPS)
    )
    torch.testing.assert_close(
        group_advantage(rewards, baseline=leave_one_out, scale=no_scale), vector(0.75, -0.5, -0.5, 0.75, -0.5)
    )


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_group_without_signal_has_no_advantage(baseline: str, scale: str) -> None:
    rewards = torch.full((7,), 0.1, dtype=torch.float64)
    advantage = group_advantage(rewards, baseline=BASELINES[baseline], scale=SCALES[scale])
    if baseline != "none":
        assert advantage.abs().max() == 0
        assert group_advantage(rewards[:1], baseline=BASELINES[baseline], scale=SCALES[scale]).tolist() == [0]
    assert advantage.isfinite().all()


def test_reductions_by_hand() -> None:
    lengths = [4, 1, 0, 5]
    assert token_mean(lengths) == [0.1, 0.1, 0, 0.1]
    assert sequence_mean(lengths) == pytest.approx([1 / 12, 1 / 3, 0, 1 / 15])
    assert sequence_sum_over_constant(lengths, constant=10) == pytest.approx([1 / 30, 1 / 30, 0, 1 / 30])
    for reduce in (token_mean, sequence_mean):
        assert sum(w * n for w, n in zip(reduce(lengths), lengths, strict=True)) == pytest.approx(1)


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean, partial(sequence_sum_over_constant, constant=9)])
def test_a_step_without_trained_tokens_weighs_nothing(reduce: Callable[[list[int]], list[float]]) -> None:
    assert reduce([0, 0]) == [0, 0]
    assert reduce([]) == []


def test_the_recipe_names_what_the_formulas_offer() -> None:
    fields = PolicyConfig.model_fields
    assert set(fields["baseline"].annotation.__args__) == set(BASELINES)
    assert set(fields["scale"].annotation.__args__) == set(SCALES)
    assert set(fields["aggregate"].annotation.__args__) == set(REDUCTIONS)


def test_logprobs_by_hand() -> None:
    logits, target = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([1])
    scaled = [math.exp(x / 0.5) for x in (1, 2, 3)]
    assert token_logp(logits, target, temperature=0.5).item() == pytest.approx(math.log(scaled[1] / sum(scaled)))
    p = [x / sum(scaled) for x in scaled]
    assert entropy(logits, temperature=0.5).item() == pytest.approx(-sum(q * math.log(q) for q in p))


def test_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (13,))
    results = []
    for elements in (11, 40, 10_000):
        logp, measured = chunked_logp(
            hidden, target, lambda h: h @ weight.T, vocabulary=11, temperature=0.7, with_entropy=True, chunk_elements=elements
        )
        grads = torch.autograd.grad((logp * torch.arange(13)).sum(), (hidden, weight))
        assert measured is not None and not measured.requires_grad
        results.append((logp.detach(), measured, *grads))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: policy.reinforce(x, vector(1, -2, 0.5)),
        lambda x: CLIPPED(x, vector(-1.05, -0.9, -0.4), vector(1, -2, 0.5)),
        lambda x: kl.k2(x, vector(-1, -2, -0.3)),
        lambda x: kl.k3(x, vector(-1, -2, -0.3)),
    ],
)
def test_gradients_agree_with_finite_differences(formula: Callable[[Tensor], Tensor]) -> None:
    at = torch.tensor([-1.0, -1.1, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(formula, (at,))
