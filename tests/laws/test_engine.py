"""Laws 1, 2 and 6: the gradient does not depend on how a step was cut, packed, padded or shared."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.laws.support import gradients, largest_difference, random_atoms, tiny_model, tiny_trainer
from whet.algorithms.distill import Distillation
from whet.algorithms.groups import Answer
from whet.algorithms.policy import weigh
from whet.algorithms.policy_loss import PolicyLoss, policy_loss
from whet.algorithms.sft import CrossEntropy
from whet.algorithms.state import Setting
from whet.config import PRESETS, PolicyConfig, TrainConfig
from whet.formulas.distill import DIVERGENCES
from whet.formulas.step import REDUCTIONS
from whet.models.attention import AGREEMENT, AttentionCall, Tree, TreeLayout, largest_gap
from whet.models.flex import Labels
from whet.models.language import Ask, pack
from whet.models.noise import noisy, row_lengths
from whet.records import Atom, Episode, Outcome, Score, TokenRow
from whet.training.base import Objective
from whet.training.engine import LocalTrainer, TokenBudget, microbatches

AXES = {
    "k2": {"kl": {"place": "loss", "estimator": "k2", "coefficient": 0.1}},
    "k3_unbiased": {"kl": {"place": "loss", "estimator": "k3_unbiased", "coefficient": 0.1}},
    "dual_clip": {"clip": {"dual": 3.0}},
    "quadratic": {"clip": {"kind": "quadratic"}},
    "entropy": {"entropy": {"coefficient": 0.01}},
    "token_tis": {"correction": {"kind": "truncate"}},
    "sequence_mis": {"correction": {"kind": "mask", "level": "sequence_mean", "low": 0.9, "high": 1.1}},
}
"""Axis values that no preset has."""


def policy_objective(config: PolicyConfig) -> PolicyLoss:
    return policy_loss(
        config,
        temperature=0.7,
        kl_coefficient=config.kl.coefficient,
        entropy_coefficient=config.entropy.coefficient,
    )


OBJECTIVES: dict[str, Objective] = {
    "sft": CrossEntropy(),
    **{name: policy_objective(PolicyConfig.model_validate(name)) for name in PRESETS},
    **{name: policy_objective(PolicyConfig.model_validate(axes)) for name, axes in AXES.items()},
    **{name: Distillation(divergence=divergence, temperature=0.7) for name, divergence in DIVERGENCES.items()},
}
EPISODE = Episode(
    task="", sample=0, seed=0, messages=(), turns=(), score=Score(value=0.0), outcome=Outcome.FINISHED
)  # fmt: skip


def policy_atoms() -> list[Atom]:
    """Random atoms with the columns of every term, and a sampler that is near the policy."""

    def complete(row: TokenRow) -> TokenRow:
        drawn = random.Random(str(row.tokens))
        near = tuple(logp + drawn.uniform(-0.2, 0.2) for logp in row.columns["old_logp"])
        marks = tuple(float(drawn.random() < 0.3) for _ in near)
        teacher = {
            "top_k/ids": np.array([drawn.sample(range(200), 3) for _ in near]),
            "top_k/logp": np.log([[0.5 + 0.1 * drawn.random(), 0.2, 0.1 * drawn.random()] for _ in near]),
        }
        return row.with_columns(sampler_logp=near, kl_cov=marks, **teacher)

    return [Atom(rows=tuple(complete(row) for row in atom.rows)) for atom in random_atoms()]


@pytest.fixture(scope="module")
def cutting() -> list[LocalTrainer]:
    """The same model with three budgets; nothing here takes a step."""
    return [tiny_trainer(), *(tiny_trainer(microbatch_tokens=budget) for budget in (1, 150))]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_cut_changes_the_gradient(name: str, reduction: str, cutting: list[LocalTrainer]) -> None:
    setting = Setting(
        config=PolicyConfig.model_validate({"reduction": reduction, "kl": {"place": "loss", "coefficient": 1}}),
        train=TrainConfig(), steps=1, prompts_per_step=1, temperature=1, max_tokens=32, max_gap=1,
        weights={},
    )  # fmt: skip
    answers = [Answer(episode=EPISODE, group=i, rows=atom.rows, reward=0.0) for i, atom in enumerate(policy_atoms())]
    atoms, objective = weigh(answers, setting), OBJECTIVES[name]
    trainer, *cut_ones = cutting
    trainer.forward_backward(atoms, objective)
    expected = gradients(trainer)
    # token_sum does not divide by anything, so the gradient itself is larger.
    tolerance = 1e-12 * max(1.0, *(float(g.abs().max()) for g in expected.values()))
    assert tolerance < 1e-9 and all(g.isfinite().all() for g in expected.values())
    for cut in cut_ones:
        cut.forward_backward(atoms, objective)
        assert largest_difference(gradients(cut), expected) < tolerance
    # Two ranks: each computes its own atoms, and the sums are added.
    for part in (atoms[:1], atoms[1:]):
        trainer.forward_backward(part, objective)
    assert largest_difference(gradients(trainer), expected) < tolerance


def test_a_group_is_cut_to_the_budget_and_rows_that_are_compared_are_not() -> None:
    """A prompt of 40 tokens and 16 answers of 100: 1,640 tokens. Each cut holds the prompt and as many as fit."""
    tokens = np.arange(140) % 200
    row = TokenRow(tokens=tokens, trained=np.arange(140) >= 40, shared=40).with_columns(weight=0.1)
    idle = row.with_columns(weight=0.0)
    group = Atom(rows=(row,) * 16)
    for budget, rows in ((10_000, [16]), (1_000, [9, 7]), (540, [5, 5, 5, 1]), (100, [1] * 16)):
        cut = list(microbatches([group, Atom(rows=(idle,))], TokenBudget(budget), together=False))
        assert [sum(len(atom.rows) for atom in micro) for micro in cut] == rows
        assert all(sum(atom.cost for atom in micro) <= max(budget, 140) for micro in cut)
        assert [
            [len(atom.rows) for atom in micro] for micro in microbatches([group], TokenBudget(budget), together=True)
        ] == [[16]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_linear_in_the_weights(name: str) -> None:
    atoms = policy_atoms()
    trainer = tiny_trainer()
    trainer.forward_backward(atoms, OBJECTIVES[name])
    once = gradients(trainer)
    trainer.forward_backward([_scaled(atom, 2.0) for atom in atoms], OBJECTIVES[name])
    twice = gradients(trainer)
    assert largest_difference(twice, {key: 2 * value for key, value in once.items()}) < 1e-12
    trainer.forward_backward([*atoms, _scaled(policy_atoms()[0], 0.0)], OBJECTIVES[name])
    assert largest_difference(gradients(trainer), once) < 1e-12


def test_sharing_the_prompt_changes_nothing() -> None:
    atoms = random_atoms()
    shared = tiny_trainer()
    shared.forward_backward(atoms, OBJECTIVES["grpo"])
    apart = tiny_trainer()
    apart.forward_backward(
        [Atom(rows=(replace(row, shared=0),)) for atom in atoms for row in atom.rows], OBJECTIVES["grpo"]
    )
    assert largest_difference(gradients(shared), gradients(apart)) < 1e-12


def test_noise_on_embeddings_is_seeded_bounded_and_of_training_alone() -> None:
    """NEFTune: within alpha / sqrt(row length x hidden size), and evaluation is as without it."""
    atoms, plain = random_atoms(), tiny_trainer()
    noisy_one = LocalTrainer(replace(tiny_model(), noise=5.0), plain.config)
    found = {}
    for name, trainer, seed in (
        ("plain", plain, 1),
        ("one", noisy_one, 1),
        ("same", noisy_one, 1),
        ("two", noisy_one, 2),
    ):
        torch.manual_seed(seed)
        trainer.forward_backward(atoms, CrossEntropy())
        found[name] = gradients(trainer)
    assert largest_difference(found["one"], found["same"]) == 0
    assert min(largest_difference(found["one"], found[other]) for other in ("plain", "two")) > 1e-4
    assert noisy_one.evaluate(atoms, CrossEntropy()) == plain.evaluate(atoms, CrossEntropy())
    layout = pack([Atom(rows=atoms[0].rows[:2])], torch.device("cpu")).layout
    lengths = [len(row.tokens) for row in atoms[0].rows[:2]]
    shared = atoms[0].rows[0].shared
    expected = [max(lengths)] * shared + [n for n in lengths for _ in range(n - shared)]
    assert row_lengths(layout).tolist() == expected
    embedding = torch.nn.Embedding.from_pretrained(torch.zeros(3, 64))
    with noisy(embedding, row_lengths(layout), 5.0):
        noise_ND = embedding(torch.zeros(1, len(expected), dtype=torch.long))[0]
    share_ND = noise_ND.abs() * (torch.tensor(expected)[:, None] * 64).sqrt() / 5
    assert 0.9 < share_ND.max() <= 1 + 1e-6 and not embedding(torch.zeros(1, 2, dtype=torch.long)).any()


def test_packed_logprobs_are_those_of_transformers() -> None:
    model, atoms = tiny_model(), random_atoms()
    with torch.no_grad():
        packed_T = model.read(atoms, Ask(frozenset({"logp"}), temperature=0.9))["logp"]
        model.module.config._attn_implementation = "sdpa"
        alone = []
        for row in (row for atom in atoms for row in atom.rows):
            logits = model.module(input_ids=torch.tensor([row.tokens.tolist()])).logits[0]
            logp_TV = (logits / 0.9).log_softmax(-1)
            alone += [logp_TV[t - 1, row.tokens[t]] for t, trained in enumerate(row.trained) if trained]
    torch.testing.assert_close(packed_T, torch.stack(alone), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_attention_backends_agree(kv_heads: int) -> None:
    torch.manual_seed(0)
    trees = (Tree(5, (3, 7, 1)), Tree(0, (4,)), Tree(9, (2, 2)), Tree(6, ()), Tree(0, (3, 8)))
    flash, masked = (TreeLayout(trees, torch.device("cpu"), backend) for backend in ("flash", "masked"))
    size, kv_size = (1, 4, flash.tokens, 8), (1, kv_heads, flash.tokens, 8)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (size, kv_size, kv_size)]
    results = []
    for layout in (flash, masked):
        out = layout.attend(*inputs, AttentionCall(layer=0, scale=0.3, window=None))
        grads = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out).sin()).sum(), inputs)
        results.append([out.detach(), *grads])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_flex_attention_sees_what_the_mask_says() -> None:
    """Forward, on a CPU; on a GPU `pick_backend` compares the gradients too, before it is used."""
    assert largest_gap("flex", torch.device("cpu"), backward=False) < 1e-5
    layout = TreeLayout((Tree(300, (5, 260)), Tree(0, (3, 200))), torch.device("cpu"), "flex")
    for window in (None, 40):
        blocks = layout.block_mask(window)
        mask_NN = blocks.to_dense()[0, 0]
        needed = layout.mask_NN(window)
        for q in range(mask_NN.shape[0]):
            for k in range(mask_NN.shape[1]):
                block = needed[q * 128 : (q + 1) * 128, k * 128 : (k + 1) * 128]
                assert mask_NN[q, k] or not block.any()
    assert layout.block_mask(None).sparsity() > 20  # percent of the blocks are never looked at


def test_a_backend_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_gap("flash", torch.device("cpu")) < 1e-5
    labels = TreeLayout.labels.func
    monkeypatch.setattr(TreeLayout, "labels", property(lambda self: _all_prefix(labels(self), self.backend)))
    assert largest_gap("flex", torch.device("cpu"), backward=False) > 10 * AGREEMENT


def test_a_sliding_window_hides_what_is_far() -> None:
    layout = TreeLayout((Tree(3, (3, 2)),), torch.device("cpu"), "masked")
    expected = torch.tensor(
        [
            # the prefix     branch 0   branch 1
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 1, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(layout.mask_NN(window=2), expected)


def test_gradient_checkpointing_changes_nothing() -> None:
    atoms, plain = random_atoms(), tiny_trainer()
    plain.forward_backward(atoms, OBJECTIVES["dapo"])
    expected = gradients(plain)
    plain.model.module.gradient_checkpointing_enable({"use_reentrant": False})
    plain.forward_backward(atoms, OBJECTIVES["dapo"])
    assert largest_difference(gradients(plain), expected) < 1e-12


def _all_prefix(labels: Labels, backend: str) -> Labels:
    """Labels under which the flex backend lets answers see each other."""
    return replace(labels, branch_N=torch.full_like(labels.branch_N, -1)) if backend == "flex" else labels


def _scaled(atom: Atom, factor: float) -> Atom:
    return Atom(
        rows=tuple(
            row.with_columns(weight=tuple(factor * weight for weight in row.columns["weight"])) for row in atom.rows
        )
    )
