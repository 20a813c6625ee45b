"""Laws 3 and 4: formulas against numbers that anyone can recompute, and against finite differences."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import pytest
import torch
from annotated_types import Ge
from pydantic import ValidationError
from torch import Tensor

from whet.config.derived import section_of
from whet.config.policy import PolicyConfig
from whet.config.policy_terms import CLIPS
from whet.config.presets import PRESETS
from whet.config.strict import Strict
from whet.formulas import policy
from whet.formulas.constants import Beta
from whet.formulas.step import (
    BASELINES,
    CREDITS,
    EPS,
    REDUCTIONS,
    SCALES,
    StepAnswers,
    group_token_mean,
    sequence_mean,
    sequence_sum_over_constant,
    token_mean,
)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def tokens(
    ratio: Tensor, advantage: Tensor, *, row: list[int] | None = None, logp: Tensor | None = None
) -> policy.Tokens:
    """Tokens with these ratios; log p is the log ratio itself unless it is given."""
    logp = ratio.log() if logp is None else logp
    return policy.Tokens(
        logp_T=logp,
        old_logp_T=(logp - ratio.log()).detach(),
        log_ratio_T=ratio.log(),
        advantage_T=advantage,
        row_T=torch.tensor(row or [0] * len(ratio)),
        rows=max(row or [0]) + 1,
    )


def answers(
    rewards: list[float], groups: list[int], lengths: list[int], greedy: list[float] | None = None
) -> StepAnswers:
    return StepAnswers(
        reward_N=vector(*rewards),
        group_N=torch.tensor(groups),
        length_N=torch.tensor(lengths),
        greedy_N=vector(*(greedy or [math.nan] * len(rewards))),
    )


def advantages(known: StepAnswers, baseline: str, scale: str) -> Tensor:
    """One number for each token, all rewards credited to all tokens."""
    return SCALES[scale](known.per_token(known.reward_N) - known.per_token(BASELINES[baseline](known)), known)


# -------------------------------------------------------------------------------------------- surrogates


def test_ppo_by_hand() -> None:
    given = tokens(vector(0.5, 0.5, 1.5, 1.5, 1.1, 9), vector(1, -1, 1, -1, 2, -1))
    loss = policy.ppo(given, low=0.2, high=0.28, dual=None)
    torch.testing.assert_close(loss, vector(-0.5, 0.8, -1.28, 1.5, -2.2, 9))
    assert policy.ppo_stops(given, low=0.2, high=0.28, dual=None).tolist() == [False, True, True, False, False, False]
    torch.testing.assert_close(policy.ppo(given, low=0.2, high=0.28, dual=3), vector(-0.5, 0.8, -1.28, 1.5, -2.2, 3))
    assert policy.ppo_stops(given, low=0.2, high=0.28, dual=3).tolist() == [False, True, True, False, False, True]


def test_cispo_keeps_a_truncated_gradient_by_hand() -> None:
    logp = vector(-1, -2, -3).requires_grad_()
    loss = policy.cispo(tokens(vector(0.5, 2, 8), vector(1, -1, 2), logp=logp), cap=5)
    torch.testing.assert_close(loss, vector(0.5, -4, 30))
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, vector(-0.5, 2, -10))


def test_sapo_by_hand() -> None:
    loss = policy.sapo(tokens(vector(1, 2, 2), vector(1, 1, -1)), positive=1.0, negative=1.05)
    expected = vector(-2, -4 / (1 + math.exp(-1)), 4 / 1.05 / (1 + math.exp(-1.05)))
    torch.testing.assert_close(loss, expected)


def test_dppo_looks_at_probabilities_by_hand() -> None:
    """From 1e-5 to 1e-3 is a ratio of 100 and no movement; from 0.9 to 0.5 a ratio of 0.56 and a large one."""
    old, new = vector(1e-5, 0.9, 0.9, 0.3), vector(1e-3, 0.5, 0.5, 0.6)
    given = tokens(new / old, vector(1, -1, 1, 1), logp=new.log())
    assert policy.dppo_stops(given, low=0.2, high=0.2, cap=20).tolist() == [False, True, False, True]
    loss = policy.dppo(given, low=0.2, high=0.2, cap=20)
    torch.testing.assert_close(loss, vector(-20 * math.log(1e-3), 0, -math.log(0.5) * 5 / 9, 0))


def test_gmpo_by_hand() -> None:
    """Row 0 (A > 0): log ratios 1 and 0.2 become 0.4 and 0.2; row 1 (A < 0): -1 becomes -0.4."""
    given = tokens(vector(1, 0.2, -1).exp(), vector(2, 2, -1), row=[0, 0, 1])
    loss = policy.geometric(given, low=0.4, high=0.4)
    torch.testing.assert_close(loss, vector(-2 * math.exp(0.3), -2 * math.exp(0.3), math.exp(-0.4)))
    assert policy.geometric_stops(given, low=0.4, high=0.4).tolist() == [True, False, True]


def test_quadratic_and_unclipped_by_hand() -> None:
    given = tokens(vector(math.e, 1), vector(2, -1), logp=vector(-1, -2))
    torch.testing.assert_close(policy.quadratic(given, beta=0.5), vector(2.25, -2))
    torch.testing.assert_close(policy.unclipped(given), vector(-2 * math.e, 1))


def test_ratio_levels_by_hand() -> None:
    log, row = vector(0.1, 0.3, -0.5), torch.tensor([0, 0, 1])
    expected = {
        "none": vector(0, 0, 0),
        "token": log,
        "sequence_mean": vector(0.2, 0.2, -0.5),
        "sequence_mean_token": vector(0.2, 0.2, -0.5),
        "sequence_product": vector(0.4, 0.4, -0.5),
    }
    # What each token's log p gets from the sum over tokens of the level, weighted 1, 2 and 3.
    gradient = {
        "none": vector(1, 2, 3),
        "token": vector(1, 2, 3),
        "sequence_mean": vector(1.5, 1.5, 3),
        "sequence_mean_token": vector(1, 2, 3),
        "sequence_product": vector(3, 3, 3),
    }
    for name, level in policy.LEVELS.items():
        at = log.clone().requires_grad_()
        value = level(at, row, 2)
        torch.testing.assert_close(value, expected[name])
        (value * vector(1, 2, 3)).sum().backward()
        torch.testing.assert_close(at.grad, gradient[name])


@pytest.mark.parametrize("kind", policy.SURROGATES)
@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_mean_token", "sequence_product", "none"])
def test_on_policy_every_surrogate_is_reinforce(kind: str, level: str) -> None:
    """Law 3, with one advantage for each row, averaged over tokens as sequence_mean does."""
    row, counts = torch.tensor([0, 0, 0, 1, 2, 2]), vector(3, 3, 3, 1, 2, 2)
    logp = -torch.rand(6, dtype=torch.float64) - 0.1
    logp.requires_grad_()
    advantage = torch.randn(3, dtype=torch.float64)[row]
    given = policy.Tokens(
        logp_T=logp,
        old_logp_T=logp.detach(),
        log_ratio_T=policy.LEVELS[level](logp - logp.detach(), row, 3),
        advantage_T=advantage,
        row_T=row,
        rows=3,
    )
    constants = CLIPS[kind](kind=kind).model_dump(exclude={"kind"})
    (policy.SURROGATES[kind].loss(given, **constants) / counts).sum().backward()
    assert not policy.SURROGATES[kind].stops(given, **constants).any()
    # The product's gradient reaches every token of the row from each of its tokens.
    factor = counts if level == "sequence_product" and kind not in ("cispo", "dppo", "quadratic", "geometric") else 1
    if kind == "geometric" and level == "sequence_product":
        factor = counts
    torch.testing.assert_close(logp.grad, -advantage / counts * factor)


def test_corrections_by_hand() -> None:
    weight = vector(0.1, 1, 3)
    torch.testing.assert_close(policy.truncate(weight.log(), low=0.5, high=2), vector(0.1, 1, 2))
    torch.testing.assert_close(policy.mask(weight.log(), low=0.5, high=2), vector(0, 1, 0))
    for correct in policy.CORRECTIONS.values():
        assert correct(vector(0, 0), low=0.5, high=2.0).tolist() == [1, 1]  # mu = pi: nothing is corrected


def test_covariance_by_hand() -> None:
    """A - mean: 1, -1, 0; log p - mean: 1, 0, -1."""
    torch.testing.assert_close(policy.covariance(vector(-1, -2, -3), vector(2, 0, 1)), vector(1, 0, 0))


def test_controllers_by_hand() -> None:
    adapt = partial(policy.adapt, target=6.0, answers=100, horizon=10_000)
    assert adapt(0.2, 6.6) == pytest.approx(0.2 * 1.001)
    assert adapt(0.2, 60.0) == pytest.approx(0.2 * 1.002)
    assert adapt(0.2, 0.0) == pytest.approx(0.2 * 0.998)
    assert adapt(0.2, 6.0) == 0.2
    assert policy.steer(0.01, 0.1, target=0.2, rate=0.005) == pytest.approx(0.015)
    assert policy.steer(0.001, 0.3, target=0.2, rate=0.005) == 0


# ---------------------------------------------------------------------------------------------------- KL


def test_kl_estimators_by_hand() -> None:
    logp, ref = vector(-1.0, -2.0), vector(-2.0, -1.0)
    torch.testing.assert_close(policy.k1(logp, ref), vector(1, -1))
    torch.testing.assert_close(policy.k2(logp, ref), vector(0.5, 0.5))
    torch.testing.assert_close(policy.k3(logp, ref), vector(math.exp(-1), math.e - 2))
    torch.testing.assert_close(policy.k3_unbiased(logp, ref, vector(2, 3).log()), vector(2 / math.e, 3 * math.e - 6))


def test_what_is_right_of_the_kl_estimators_by_enumeration() -> None:
    """A four-way categorical: values of k1 and k3, gradients of k2 (on-policy), of r k3 (off-policy) and of k1."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.2, 0.4, 0.1, 0.3], dtype=torch.float64).log_softmax(-1)
    old = torch.tensor([0.5, -0.5, 0.8, 0.2], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    p = logp.exp().detach()
    for estimate in (policy.k1, policy.k3):
        torch.testing.assert_close((p * estimate(logp, ref)).sum(), exact)

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient((p * policy.k2(logp, ref)).sum()), gradient(exact))
    torch.testing.assert_close(gradient((old.exp() * policy.k3_unbiased(logp, ref, logp - old)).sum()), gradient(exact))
    assert gradient((p * policy.k1(logp, ref)).sum()).abs().max() < 1e-15
    # k3 as a plain loss is the gradient of the *forward* KL(reference || policy).
    torch.testing.assert_close(gradient((p * policy.k3(logp, ref)).sum()), gradient((ref.exp() * (ref - logp)).sum()))


def test_what_holds_of_answers_does_not_hold_of_tokens() -> None:
    """All answers of two tokens over three words: the answers' KL has the gradient of k2 and r k3 of answers, and of k1
    in the reward; k2 and r k3 of tokens have that of the next tokens' KL with the prefix fixed, which is another."""
    torch.manual_seed(1)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)  # row 0: the first token; 1 + a: after token a
    ref, old = (torch.randn(4, 3, dtype=torch.float64).log_softmax(-1) for _ in range(2))

    def tokens(table: Tensor) -> Tensor:  # (answers, tokens)
        return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a in range(3) for b in range(3)])

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    table = logits.log_softmax(-1)
    logp, ref_logp, old_logp = tokens(table), tokens(ref), tokens(old)
    answer, ref_answer, old_answer = logp.sum(-1), ref_logp.sum(-1), old_logp.sum(-1)
    p, p_old = answer.detach().exp(), old_answer.exp()
    exact = (answer.exp() * (answer - ref_answer)).sum()
    of_answers = gradient(exact)
    for estimate in (policy.k1, policy.k3):
        torch.testing.assert_close((p * estimate(logp, ref_logp).sum(-1)).sum(), exact)
        torch.testing.assert_close((p * estimate(answer, ref_answer)).sum(), exact)
    torch.testing.assert_close(gradient((p * policy.k2(answer, ref_answer)).sum()), of_answers)
    unbiased = policy.k3_unbiased(answer, ref_answer, answer - old_answer)
    torch.testing.assert_close(gradient((p_old * unbiased).sum()), of_answers)
    paid = policy.k1(answer, ref_answer).detach()
    torch.testing.assert_close(gradient((p * paid * answer).sum()), of_answers)
    next_token = (table.exp() * (table - ref)).sum(-1)  # of each prefix
    prefix = torch.cat([torch.ones(1, dtype=torch.float64), table[0].detach().exp()])
    with_prefix_fixed = gradient((prefix * next_token).sum())
    torch.testing.assert_close(gradient((p * policy.k2(logp, ref_logp).sum(-1)).sum()), with_prefix_fixed)
    assert (of_answers - with_prefix_fixed).abs().max() > 0.05


# ------------------------------------------------------------------------------------------- advantages

TWO_GROUPS = answers([1, 0, 0, 1, 0, 2, 2], [0, 0, 0, 0, 0, 1, 1], [1, 2, 3, 4, 5, 1, 1])


def per_answer(*values: float) -> Tensor:
    return TWO_GROUPS.per_token(vector(*values))


def test_baselines_by_hand() -> None:
    expected = {
        "none": [0, 0, 0, 0, 0, 0, 0],
        "group_mean": [0.4, 0.4, 0.4, 0.4, 0.4, 2, 2],
        "leave_one_out": [0.25, 0.5, 0.5, 0.25, 0.5, 2, 2],
        "length_weighted_mean": [1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 2, 2],
        "batch_mean": [6 / 7] * 7,
        "greedy": [1, 1, 1, 1, 1, 0, 0],
    }
    known = answers([1, 0, 0, 1, 0, 2, 2], [0, 0, 0, 0, 0, 1, 1], [1, 2, 3, 4, 5, 1, 1], [1, 1, 1, 1, 1, 0, 0])
    for name, baseline in BASELINES.items():
        torch.testing.assert_close(baseline(known), vector(*expected[name]))


def test_scales_by_hand() -> None:
    mean, std = 0.4, math.sqrt(0.3)
    centred = [x - mean for x in (1, 0, 0, 1, 0)]
    torch.testing.assert_close(
        advantages(TWO_GROUPS, "group_mean", "group_std"), per_answer(*(x / (std + EPS) for x in centred), 0, 0)
    )
    everything = [1, 0, 0, 1, 0, 2, 2]
    spread = math.sqrt(sum((x - 6 / 7) ** 2 for x in everything) / 6)
    torch.testing.assert_close(
        advantages(TWO_GROUPS, "group_mean", "batch_std"), per_answer(*(x / (spread + EPS) for x in centred), 0, 0)
    )
    torch.testing.assert_close(
        advantages(TWO_GROUPS, "group_mean", "informative_share"), per_answer(*(x * 7 / 5 for x in centred), 0, 0)
    )
    whitened = advantages(TWO_GROUPS, "group_mean", "token_std")
    raw = per_answer(*centred, 0, 0)
    torch.testing.assert_close(whitened, (raw - raw.mean()) / (raw.std() + EPS))


def test_credits_by_hand() -> None:
    rewards = vector(-0.1, -0.2, 0.7)
    torch.testing.assert_close(CREDITS["outcome"](rewards), vector(0.4, 0.4, 0.4))
    torch.testing.assert_close(CREDITS["return_to_go"](rewards), vector(0.4, 0.5, 0.7))


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
def test_group_advantages_sum_to_zero_and_do_not_know_the_rewards_scale(baseline: str, scale: str) -> None:
    rewards, groups = [1, 0, 0.5, 3, -1, 0.5], [0, 0, 0, 1, 1, 1]
    given = advantages(answers(rewards, groups, [1] * 6), baseline, scale)
    assert given[:3].sum().abs() < 1e-12 and given[3:].sum().abs() < 1e-12
    if scale != "none":  # up to EPS, which does not scale along
        other = advantages(answers([1000 * r + 7 for r in rewards], groups, [1] * 6), baseline, scale)
        torch.testing.assert_close(other, given, rtol=1e-5, atol=0)


@pytest.mark.parametrize("baseline", [name for name in BASELINES if name != "greedy"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_order_of_answers_and_of_groups_does_not_matter(baseline: str, scale: str) -> None:
    rewards, groups, lengths = [1, 0, 0.5, 3, -1, 0.5], [0, 0, 0, 1, 1, 1], [2, 1, 4, 1, 3, 2]
    given = advantages(answers(rewards, groups, lengths), baseline, scale)
    firsts = [sum(lengths[:i]) for i in range(6)]
    order = [4, 0, 5, 2, 1, 3]
    shuffled = answers([rewards[i] for i in order], [1 - groups[i] for i in order], [lengths[i] for i in order])
    again = advantages(shuffled, baseline, scale)
    places = [sum(lengths[i] for i in order[:k]) for k in range(6)]
    torch.testing.assert_close(again[places], given[[firsts[i] for i in order]])


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "length_weighted_mean", "batch_mean"])
@pytest.mark.parametrize("scale", SCALES)
def test_without_a_difference_there_is_exactly_no_advantage(baseline: str, scale: str) -> None:
    equal = answers([0.1] * 7, [0, 0, 0, 0, 1, 1, 2], [3, 1, 2, 5, 1, 1, 7])
    assert advantages(equal, baseline, scale).tolist() == [0] * 20


def test_a_group_of_one_has_no_advantage_beside_one_that_has() -> None:
    known = answers([0.7, 1, 0], [0, 1, 1], [1, 1, 1])
    for baseline in ("group_mean", "leave_one_out", "length_weighted_mean"):
        assert advantages(known, baseline, "group_std")[0] == 0
        assert advantages(known, baseline, "none")[1] > 0


# ------------------------------------------------------------------------------------------- reductions


def test_reductions_by_hand() -> None:
    lengths, groups = [4, 1, 0, 5], [0, 0, 1, 2]
    expected = {
        "token_mean": [0.1, 0.1, 0, 0.1],
        "group_token_mean": [1 / 10, 1 / 10, 0, 1 / 10],
        "sequence_mean": [1 / 12, 1 / 3, 0, 1 / 15],
        "sequence_sum": [1 / 3, 1 / 3, 0, 1 / 3],
        "sequence_sum_over_constant": [1 / 30, 1 / 30, 0, 1 / 30],
        "token_sum": [1, 1, 0, 1],
    }
    for name, reduce in REDUCTIONS.items():
        assert reduce(lengths, groups, 10) == pytest.approx(expected[name])
        assert reduce([0, 0], [0, 1], 10) == [0, 0]
        assert reduce([], [], 10) == []
    assert group_token_mean([1, 3, 4], groups_N=[0, 1, 1]) == pytest.approx([1 / 2, 1 / 14, 1 / 14])
    for weights in (token_mean(lengths), sequence_mean(lengths), group_token_mean(lengths, groups_N=groups)):
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1)
    assert sequence_sum_over_constant([2], constant=4) == [0.25]


# ---------------------------------------------------------------------------------------- names, log p


def test_a_sections_keys_are_the_constants_of_its_function() -> None:
    """A loss is added in one place: its signature says name, range, default and text of every key."""

    def toy(pairs: object, *, beta: Beta = 0.3, power: Annotated[int, Ge(1)] = 2) -> None:
        """Twice as good."""

    section = section_of(toy, "toy", base=Strict)
    assert section().model_dump() == {"beta": 0.3, "power": 2} and section.__doc__ == "Twice as good."
    assert "how sharp the contrast is" in section.model_json_schema()["properties"]["beta"]["description"]
    for wrong in ({"beta": 0}, {"power": 0.5}, {"gamma": 1}):
        with pytest.raises(ValidationError):
            section.model_validate(wrong)
    with pytest.raises(ValidationError, match="'group_mean'"):
        PolicyConfig.model_validate({"baseline": "group_men"})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_what_differs_from_the_defaults(name: str) -> None:
    """Take any axis, or any number of one, out of it: what is left is another point, or none."""
    axes = PRESETS[name]
    whole = PolicyConfig.model_validate(axes)
    smaller = [{k: v for k, v in axes.items() if k != axis} for axis in axes]
    for axis, value in axes.items():
        if isinstance(value, dict):
            smaller += [{**axes, axis: {k: v for k, v in value.items() if k != key}} for key in value]
    for less in smaller:
        try:
            assert PolicyConfig.model_validate(less) != whole, less
        except ValidationError:
            continue


@pytest.mark.parametrize("kind", CLIPS)
def test_a_clips_keys_are_its_formulas_constants(kind: str) -> None:
    for formula in policy.SURROGATES[kind][:2]:
        parameters = inspect.signature(formula).parameters.values()
        constants = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert formula is policy.nowhere or constants == set(CLIPS[kind].model_fields) - {"kind"}


def _surrogate(kind: str, level: str, **constants: float | None) -> Callable[[Tensor], Tensor]:
    old, advantage, row = vector(-1.05, -0.9, -0.4), vector(1, 1, -0.5), torch.tensor([0, 0, 1])

    def formula(logp: Tensor) -> Tensor:
        given = policy.Tokens(
            logp_T=logp, old_logp_T=old, log_ratio_T=policy.LEVELS[level](logp - old, row, 2), advantage_T=advantage,
            row_T=row, rows=2,
        )  # fmt: skip
        return policy.SURROGATES[kind].loss(given, **constants)

    return formula


@pytest.mark.parametrize(
    "formula",
    [
        _surrogate("ppo", "token", low=0.2, high=0.28, dual=None),
        _surrogate("ppo", "token", low=0.05, high=0.05, dual=1.01),
        _surrogate("ppo", "sequence_mean", low=3e-4, high=4e-4, dual=None),
        _surrogate("ppo", "sequence_product", low=10, high=10, dual=None),
        _surrogate("geometric", "token", low=0.4, high=0.4),
        _surrogate("sapo", "token", positive=1.0, negative=1.05),
        _surrogate("quadratic", "token", beta=0.3),
        _surrogate("none", "token"),
        lambda x: policy.k2(x, vector(-1, -2, -0.3)),
        lambda x: policy.k3(x, vector(-1, -2, -0.3)),
        lambda x: policy.k3_unbiased(x, vector(-1, -2, -0.3), x - vector(-1.05, -0.9, -0.4)),
    ],
)
def test_gradients_agree_with_finite_differences(formula: Callable[[Tensor], Tensor]) -> None:
    """Those that hold something constant (CISPO, DPPO, GSPO-token) have their gradients by hand above."""
    at = torch.tensor([-1.0, -1.1, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(formula, (at,))
