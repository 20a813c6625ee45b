"""What stands beside the surrogate: PPO-ptx, references that move, the two ratios of decoupled PPO."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.laws.support import gradients, tiny_trainer
from tests.test_policy import FakeFeed, _two_groups, _with_reference, config, prepared, setting
from tests.test_ppo import recipe, run, weights
from whet.algorithms.policy import policy_gradient, weigh
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.sft import CrossEntropy, PretrainingMix
from whet.algorithms.sft import weigh as weigh_rows
from whet.config.policy_terms import PtxConfig
from whet.pipeline.stage import Interrupted
from whet.records import Atom, TokenRow
from whet.training.base import Batch, Outputs

DATA = {"generate": "arithmetic", "count": 12, "digits": 1}


def rows(count: int) -> list[TokenRow]:
    return [TokenRow(tokens=(1, 2 + i, 3, 4), trained=(False, True, i % 2 == 0, True)) for i in range(count)]


def mix(count: int, *, coefficient: float = 1.0, size: int = 4) -> PretrainingMix:
    return PretrainingMix(
        rows=rows(count),
        config=PtxConfig.model_validate({"data": DATA, "coefficient": coefficient, "batch_size": size}),
        seed=3,
    )


# --------------------------------------------------------------------------------------------- PPO-ptx


def test_ptx_adds_its_coefficient_times_the_mean_nll() -> None:
    trainer, added = tiny_trainer(), mix(5, coefficient=0.25)
    answers, chosen = prepared(trainer, _two_groups(), setting(config())), setting(config())
    objective = policy_loss(config(), temperature=1.0, kl_coefficient=0.0)
    trainer.forward_backward(weigh(answers, chosen), objective)
    policy = gradients(trainer)
    taken = [atom.rows[0] for atom in added.atoms(7)]
    trainer.forward_backward(weigh_rows([TokenRow(tokens=r.tokens, trained=r.trained) for r in taken]), CrossEntropy())
    imitation = gradients(trainer)
    trainer.forward_backward(weigh(answers, chosen), objective)
    found = added.add(trainer, 7)
    both = gradients(trainer)
    for name in both:
        torch.testing.assert_close(both[name], policy[name] + 0.25 * imitation[name], rtol=0, atol=1e-12)
    assert found["ptx/loss"].weight == sum(r.trained_count for r in taken)


def test_the_rows_of_an_update_follow_from_its_number() -> None:
    added = mix(6)
    drawn = [atom.rows[0].tokens[1] for update in range(3) for atom in added.atoms(update)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [2, 3, 4, 5, 6, 7]
    first, second = drawn[:6], drawn[6:]
    assert sorted(first) != first != second != sorted(second), "shuffled, each epoch in its own way"
    assert [atom.rows[0].tokens[1] for atom in mix(6).atoms(2)] == drawn[8:]


def test_a_run_with_ptx_says_its_loss_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    axes = {"preset": "rloo", "scale": "none", "ptx": {"data": DATA, "coefficient": 0.5, "batch_size": 4}}
    whole, cut = recipe(tmp_path / "whole", **axes), recipe(tmp_path / "cut", **axes)
    expected = run(whole)
    with pytest.raises(Interrupted):
        run(cut, stop_after=2)
    assert run(cut) == expected
    assert weights(cut.model_folder("rl")) == weights(whole.model_folder("rl"))
    assert expected[-1]["ptx/loss"] < expected[0]["ptx/loss"]


# ------------------------------------------------------------------------------------- moving references


def test_a_renewed_reference_is_the_average_that_was_asked_for() -> None:
    """keep 3/4: three quarters of what it was and one quarter of the weights as they are."""
    trainer = _with_reference(tiny_trainer(dtype=torch.float32))
    frozen = trainer.frozen["reference"].module
    with torch.no_grad():
        for p in trainer.model.parameters.values():
            p.add_(1.0)
    old = {name: p.clone() for name, p in frozen.named_parameters()}
    trainer.update_frozen("reference", 0.75)
    for name, p in frozen.named_parameters():
        torch.testing.assert_close(p, old[name] + 0.25)


def test_a_reference_that_follows_keeps_the_kl_lower() -> None:
    """The same run against a fixed reference, a moving average (every step, 0.5 kept) and one reset every step."""

    def last_kl(**kl: float) -> float:
        trainer = _with_reference(tiny_trainer(dtype=torch.float32))
        policy = config(preset="grpo", kl={"coefficient": 1e-4, **kl})
        feed = FakeFeed(trainer, partial(_two_groups))
        *_, step = policy_gradient(trainer, feed, setting(policy, steps=4))  # type: ignore[arg-type]
        return step.metrics["kl"]

    fixed, average, reset = last_kl(), last_kl(update_every=1, ema_decay=0.5), last_kl(update_every=1)
    assert reset == pytest.approx(0, abs=1e-9) and reset < average < fixed


# ----------------------------------------------------------------------------------------- decoupled PPO


def test_decoupled_ppo_by_hand() -> None:
    """Ratio to the trainer's old policy, clipped at 1.2; weight p_old / p_sampler, left out above 5 (AReaL's cap)."""
    policy = config(preset="decoupled_ppo")
    objective = policy_loss(policy, temperature=1.0, kl_coefficient=0.0)
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones(3, dtype=torch.float64)
    columns = {
        "old_logp": torch.tensor([-1.1, -1.1, -1.5], dtype=torch.float64),
        "sampler_logp": torch.tensor([-1.6, -3.1, -0.5], dtype=torch.float64),
        "advantage": torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64),
    }
    row_T = torch.tensor([0, 1, 1])
    batch = Batch(weight_T=one, row_T=row_T, rows=2, atom_R=torch.tensor([0, 1]), columns=columns)
    loss, _ = objective(Outputs(logp_T=logp, entropy_T=one), batch)
    assert float(loss.detach()) == pytest.approx(-(math.exp(0.5) * math.exp(0.1) * 2) - math.exp(-1) * 1.2)
    loss.backward()
    # The first token is inside the clip: -w r A. The second weighs e^2 and is left out. The third is beyond the clip,
    # and its weight of e^-1 stays: there is no lower bound.
    torch.testing.assert_close(logp.grad, torch.tensor([-math.exp(0.6) * 2, 0.0, 0.0], dtype=torch.float64))


def test_where_the_sampler_is_the_trainer_decoupled_ppo_is_ppo() -> None:
    trainer = tiny_trainer()
    atoms = weigh(prepared(trainer, _two_groups(), setting(config(preset="decoupled_ppo"))), setting(config()))
    same = [Atom(rows=tuple(r.with_columns(sampler_logp=r.columns["old_logp"]) for r in atom.rows)) for atom in atoms]
    found = []
    for policy in (config(preset="decoupled_ppo"), config(preset="decoupled_ppo", correction=None)):
        trainer.forward_backward(same, policy_loss(policy, temperature=1.0, kl_coefficient=0.0))
        found.append(gradients(trainer))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)
