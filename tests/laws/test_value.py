"""PPO's critic: formulas by hand and by finite differences, and the engine's laws for values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.laws.support import (
    SHAPE,
    _widen_norms,
    gradients,
    largest_difference,
    random_atoms,
    scores_of,
    tiny_trainer,
    values_of,
)
from whet.algorithms.critic import ValueLoss, WithValue
from whet.algorithms.sft import CrossEntropy
from whet.config import LoraConfig, ModelConfig, TrainConfig
from whet.config.rewards import ScorerConfig
from whet.envs.clients import Passage
from whet.errors import ModelError
from whet.formulas import value
from whet.launch.world import LocalWorld
from whet.models.heads import RewardFacts, add_score, note_reward_facts
from whet.models.language import LanguageModel
from whet.models.load import load_model, load_scalar_model
from whet.records import Atom, Message, TokenRow
from whet.training.base import Objective
from whet.training.engine import LocalTrainer, share_prompts

TINY = ModelConfig(path="whet:tiny", create=SHAPE)
REGRESS = ValueLoss(clip=0.2)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ formulas


def test_gae_by_hand() -> None:
    rewards, values = vector(0, 0, 1), vector(0.5, 0.6, 0.7)
    # d = (0.1, 0.1, 0.3); A3 = 0.3, A2 = 0.1 + 0.95 * 0.3, A1 = 0.1 + 0.95 * A2
    torch.testing.assert_close(value.gae(rewards, values, gamma=1, lam=0.95), vector(0.46575, 0.385, 0.3))
    # gamma 0.9: d = (0.04, 0.03, 0.3) and each step back is worth 0.9 * 0.5
    torch.testing.assert_close(value.gae(rewards, values, gamma=0.9, lam=0.5), vector(0.11425, 0.165, 0.3))


def test_gae_is_the_discounted_sum_of_its_deltas() -> None:
    rewards, values = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    gamma, lam, after = 0.97, 0.9, 0.4
    delta = rewards + gamma * torch.cat([values[1:], vector(after)]) - values
    expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(40 - t)) for t in range(40)]
    found = value.gae(rewards, values, gamma=gamma, lam=lam, bootstrap=after)
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(value.gae(rewards, values, gamma=gamma, lam=0, bootstrap=after), delta)


def test_with_gamma_and_lambda_one_the_advantage_is_return_minus_value() -> None:
    rewards, values = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    to_go = rewards.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(value.gae(rewards, values, gamma=1, lam=1), to_go - values)
    # ... and the returns are Monte Carlo, whatever the values, also beside a smaller lambda for the policy (VC-PPO).
    torch.testing.assert_close(value.returns(rewards, values, gamma=1, lam=1), to_go)


def test_a_cut_answer_ends_in_nothing_or_in_its_last_state() -> None:
    rewards, values = vector(0, 0), vector(0.5, 0.6)
    assert value.returns(rewards, values, gamma=1, lam=1).tolist() == [0, 0]
    torch.testing.assert_close(value.returns(rewards, values, gamma=1, lam=1, bootstrap=0.8), vector(0.8, 0.8))
    torch.testing.assert_close(value.gae(rewards, values, gamma=1, lam=0, bootstrap=0.8), vector(0.1, 0.2))


@pytest.mark.parametrize(("length", "lam"), [(5, 0.0), (20, 0.0), (100, 0.8), (1000, 0.98)])
def test_the_length_adaptive_lambda(length: int, lam: float) -> None:
    assert value.length_adaptive_lambda(length, alpha=0.05) == pytest.approx(lam)


def test_turns_are_actions() -> None:
    rewards, values, turn = vector(0, 0.5, 0, 1), vector(0.2, 9, 0.6, 9), torch.tensor([0, 0, 1, 1])
    # Turn values 0.2 and 0.6, rewards 0.5 and 1: d = (0.5 + 0.9 * 0.6 - 0.2, 1 - 0.6) = (0.84, 0.4)
    first = 0.84 + 0.9 * 0.5 * 0.4
    found = value.turn_gae(rewards, values, turn, gamma=0.9, lam=0.5)
    torch.testing.assert_close(found, vector(first, first, 0.4, 0.4))
    alone = value.turn_gae(rewards, values, torch.arange(4), gamma=0.9, lam=0.5)
    torch.testing.assert_close(alone, value.gae(rewards, values, gamma=0.9, lam=0.5))


def test_the_value_loss_by_hand() -> None:
    now, old, target = vector(1, -1, 0.1, 3), vector(0, 0, 0, 0), vector(2, 2, 2, 2)
    loss = value.clipped_value_loss(now, old, target, clip=0.2)
    # 1 moved too far towards the target (its loss is that of 0.2); -1 moved away, 0.1 is near, 3 overshot within reach.
    torch.testing.assert_close(loss, vector(1.8**2, 3**2, 1.9**2, 1.8**2) / 2)
    assert value.value_clipped(now, old, target, clip=0.2).tolist() == [1, 0, 0, 1]
    torch.testing.assert_close(value.value_loss(now, target), vector(1, 9, 1.9**2, 1) / 2)


def test_explained_variance() -> None:
    returns = vector(0, 1, 0, 1, 2)
    assert value.explained_variance(returns, returns) == 1
    assert value.explained_variance(returns + 5, returns) == 1
    assert value.explained_variance(torch.full_like(returns, 3), returns) == pytest.approx(0)
    assert value.explained_variance(-returns, returns) == pytest.approx(-3)
    assert value.explained_variance(returns, torch.ones_like(returns)) != value.explained_variance(returns, returns)


@pytest.mark.parametrize(
    "loss", [value.value_loss, lambda v, r: value.clipped_value_loss(v, vector(0, 0, 0), r, clip=0.2)]
)
def test_gradients_agree_with_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    at = torch.tensor([1.0, -1.0, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: loss(v, vector(2, 2, 2)), (at,))


def test_the_clip_fraction_counts_where_the_gradient_stops() -> None:
    now = torch.randn(500, dtype=torch.float64, requires_grad=True)
    old, target = torch.randn(500, dtype=torch.float64), torch.randn(500, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value.clipped_value_loss(now, old, target, clip=0.2).sum(), now)
    assert torch.equal(gradient == 0, value.value_clipped(now, old, target, clip=0.2) == 1)


# ------------------------------------------------------------------------------------------------ the engine


def separate(**train: object) -> LocalTrainer:
    """A value model of its own, in float64, with a head that is not zero."""
    model = load_scalar_model(TINY)
    _widen_norms(model.module)
    return _trainer(replace(model, module=model.module.double()), **train)


def shared(**train: object) -> LocalTrainer:
    """A policy with a critic on its trunk."""
    model = tiny_trainer().model
    add_score(model.module)
    return _trainer(model, **train)


def _trainer(model: LanguageModel, **train: object) -> LocalTrainer:
    torch.manual_seed(1)
    torch.nn.init.normal_(model.module.score.weight, std=0.1)
    return LocalTrainer(model, TrainConfig.model_validate({"clip_norm": None, **train}))


def judged_atoms() -> list[Atom]:
    """Random atoms with the critic's columns."""
    torch.manual_seed(2)

    def judged(row: TokenRow) -> TokenRow:
        numbers = {name: tuple(torch.randn(row.trained_count).tolist()) for name in ("value", "return")}
        return row.with_columns(**numbers)

    return [Atom(rows=tuple(judged(row) for row in atom.rows)) for atom in random_atoms()]


KINDS: dict[str, tuple[Callable[..., LocalTrainer], Objective]] = {
    "separate": (separate, REGRESS),
    "shared": (shared, WithValue(policy=CrossEntropy(), value=ValueLoss(clip=None), coefficient=0.1)),
    "shared, values alone": (shared, REGRESS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_changes_the_gradient(kind: str) -> None:
    make, objective = KINDS[kind]
    atoms, whole = judged_atoms(), make()
    metrics = whole.forward_backward(atoms, objective)
    expected = gradients(whole)
    assert expected.keys() >= {"score.weight", "model.embed_tokens.weight"}
    assert all(bool(gradient.abs().max() > 0) for gradient in expected.values())
    for budget in (1, 60, 150):
        cut = make(microbatch_tokens=budget)
        again = cut.forward_backward(atoms, objective)
        assert largest_difference(gradients(cut), expected) < 1e-12
        for name, metric in metrics.items():
            assert again[name].total == pytest.approx(metric.total, abs=1e-10)
    for part in (atoms[:1], atoms[1:]):
        whole.forward_backward(part, objective)
    assert largest_difference(gradients(whole), expected) < 1e-12
    whole.forward_backward([Atom(rows=(replace(row, shared=0),)) for atom in atoms for row in atom.rows], objective)
    assert largest_difference(gradients(whole), expected) < 1e-12


@pytest.mark.parametrize("make", [separate, shared])
def test_values_are_those_of_the_state_before_each_token(make: Callable[..., LocalTrainer]) -> None:
    trainer, rows = make(), [row for atom in random_atoms() for row in atom.rows]
    packed = values_of(trainer, rows)
    trainer.budget.tokens = 1
    alone = values_of(trainer, rows)
    module = trainer.model.module
    module.config._attn_implementation = "sdpa"
    for row, together, single in zip(rows, packed, alone, strict=True):
        with torch.no_grad():
            hidden = module.get_decoder()(input_ids=torch.tensor([row.tokens])).last_hidden_state[0]
        expected = [module.score(hidden[t - 1]).item() for t, trained in enumerate(row.trained) if trained]
        assert together == pytest.approx(expected, abs=1e-12)
        assert single == pytest.approx(expected, abs=1e-12)


def test_rows_that_share_a_prompt_are_read_together() -> None:
    atoms = random_atoms()
    rows = [row for atom in zip(*(atom.rows for atom in atoms), strict=True) for row in atom]
    groups = share_prompts(rows, 10_000)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert len(groups) == len(atoms)
    assert len(share_prompts(rows, 1)) == len(rows)
    assert len(share_prompts([replace(row, shared=0) for row in rows], 10_000)) == len(rows)


def test_a_new_head_says_nothing_and_learns_first() -> None:
    trainer = LocalTrainer(load_scalar_model(TINY), TrainConfig())
    rows = [row for atom in judged_atoms() for row in atom.rows]
    assert {v for values in values_of(trainer, rows) for v in values} == {0.0}
    trainer.forward_backward(judged_atoms(), REGRESS)
    found = gradients(trainer)
    assert {name for name, gradient in found.items() if gradient.abs().max() > 0} == {"score.weight"}


def test_a_value_model_starts_from_the_policys_trunk() -> None:
    policy, critic = load_model(ModelConfig(path="whet:demo")), load_scalar_model(ModelConfig(path="whet:demo"))
    assert critic.parameters.keys() - policy.parameters.keys() == {"score.weight"}
    for name, p in critic.parameters.items():
        assert name == "score.weight" or torch.equal(p, policy.parameters[name])


def test_resume_equals_never_stopped(tmp_path: Path) -> None:
    atoms, first, second = judged_atoms(), separate(), separate()
    for trainer in (first, first):
        trainer.forward_backward(atoms, REGRESS)
        trainer.optim_step(1.0)
    first.save(tmp_path)
    second.load(tmp_path)
    for trainer in (first, second):
        trainer.forward_backward(atoms, REGRESS)
        trainer.optim_step(1.0)
    for name, p in first.model.parameters.items():
        assert torch.equal(p, second.model.parameters[name])


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_what_is_exported_gives_the_same_score_in_transformers(tmp_path: Path, lora: LoraConfig | None) -> None:
    trainer = _trainer(load_scalar_model(TINY, lora=lora))
    trainer.forward_backward(judged_atoms(), REGRESS)
    trainer.optim_step(1.0)
    trainer.export(tmp_path)
    rows = [_ending(row) for atom in random_atoms() for row in atom.rows]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    ours = LocalTrainer(load_scalar_model(ModelConfig(path=str(tmp_path))), TrainConfig())
    for row, (before,), (after,) in zip(rows, values_of(trainer, rows), values_of(ours, rows), strict=True):
        with torch.no_grad():
            score = float(theirs(torch.tensor([row.tokens[:-1]])).logits)
        assert before == pytest.approx(score, abs=1e-4)
        assert after == pytest.approx(score, abs=1e-4)


def test_a_critic_that_begins_as_a_reward_model_has_its_zero_and_unit(tmp_path: Path) -> None:
    _trainer(load_scalar_model(TINY)).export(tmp_path)
    rows = [row for atom in random_atoms() for row in atom.rows]
    raw = LocalTrainer(load_scalar_model(ModelConfig(path=str(tmp_path))), TrainConfig())
    note_reward_facts(tmp_path, RewardFacts(mean=0.5, std=4.0))
    critic = LocalTrainer(load_scalar_model(ModelConfig(path=str(tmp_path))), TrainConfig())
    expected = [tuple((v - 0.5) / 4 for v in values) for values in values_of(raw, rows)]
    for values, wanted in zip(values_of(critic, rows), expected, strict=True):
        assert values == pytest.approx(wanted, abs=1e-6)
    taught = [row.with_columns(**{"return": v, "value": v}, weight=v) for row, v in zip(rows, expected, strict=True)]
    assert critic.evaluate([Atom(rows=(row,)) for row in taught], REGRESS)["value/loss"].total < 1e-10
    assert scores_of(critic, rows) == scores_of(raw, rows)  # a reward model is still read, and taught, as it is


def test_a_policy_leaves_its_critic_behind(tmp_path: Path) -> None:
    load_model(TINY, with_score=True).export(tmp_path)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"]


def test_a_classifier_of_many_labels_is_no_critic_and_a_reward_by_its_weights_alone(tmp_path: Path) -> None:
    model = load_scalar_model(TINY, objectives=("a", "b", "c"))
    torch.nn.init.normal_(model.module.score.weight)
    model.export(tmp_path)
    world, where = LocalWorld(), ModelConfig(path=str(tmp_path))
    with pytest.raises(ModelError, match="rates a, b, c, and one number is needed here"):
        world.scalar_model(where, TrainConfig())
    passage = Passage(messages=(Message(role="user", content="p"), Message(role="assistant", content="q")), ends=(1,))
    with pytest.raises(ModelError, match="has several objectives and no gate"):
        world.scorer(ScorerConfig(path=str(tmp_path)), steps=False).read([passage])
    with pytest.raises(ModelError, match="has several outputs, and a process reward model has one"):
        world.scorer(ScorerConfig(path=str(tmp_path)), steps=True).read([passage])
    weighed = ScorerConfig(path=str(tmp_path), objectives={"a": 1, "c": -2})
    (read,) = world.scorer(weighed, steps=False).read([passage])
    assert read.scores[0] == pytest.approx(read.parts["a"] - 2 * read.parts["c"])


def _ending(row: TokenRow) -> TokenRow:
    """The row with one more token, before which the state is that of the whole row."""
    return TokenRow(tokens=(*row.tokens, 0), trained=(*([False] * len(row.tokens)), True), shared=row.shared)
