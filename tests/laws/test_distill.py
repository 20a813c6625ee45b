"""Distillation: divergences by hand and at their limits, gradients of several targets, the sampled-token estimate."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.laws.support import gradients, largest_difference, random_atoms, tiny_model, tiny_trainer
from whet.algorithms.distill import Distillation
from whet.algorithms.sft import weigh_again
from whet.formulas.distill import DIVERGENCES, forward_kl, jsd, reverse_kl, with_tail
from whet.formulas.logprobs import Linear, chunked_logp, token_logp
from whet.models.language import pack
from whet.records import Atom
from whet.training.base import TEACHER
from whet.training.engine import LocalTrainer

V = 266
"""Tokens of the tiny model's vocabulary."""
TEACHER_P = (0.5, 0.3, 0.15, 0.05)
STUDENT_P = (0.25, 0.25, 0.4, 0.1)


def logs(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def kl(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True))


def merged(p: tuple[float, ...], k: int) -> tuple[float, ...]:
    """The k first, and the sum of the others."""
    return (*p[:k], sum(p[k:]))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_divergences_by_hand(k: int) -> None:
    """The rest of the vocabulary is one bucket; beta .1 and .9 tell a swap of the two sides, which .5 cannot."""
    student, teacher = with_tail(logs(*STUDENT_P[:k])), with_tail(logs(*TEACHER_P[:k]))
    s, t = merged(STUDENT_P, k), merged(TEACHER_P, k)
    assert forward_kl(student, teacher).item() == pytest.approx(kl(t, s), rel=1e-12)
    assert reverse_kl(student, teacher).item() == pytest.approx(kl(s, t), rel=1e-12)
    for beta in (0.1, 0.5, 0.9):
        m = tuple(beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True))
        expected = beta * kl(t, m) + (1 - beta) * kl(s, m)
        assert jsd(student, teacher, beta=beta).item() == pytest.approx(expected, rel=1e-12)


def test_the_ends_of_the_jsd_are_the_two_divergences() -> None:
    """Over beta, resp. 1 - beta, the generalised JSD goes to the forward and to the reverse KL."""
    student, teacher = logs(*STUDENT_P), logs(*TEACHER_P)
    low, high = jsd(student, teacher, beta=1e-6) / 1e-6, jsd(student, teacher, beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(low, forward_kl(student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(high, reverse_kl(student, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_coarser_view_never_shows_more(name: str) -> None:
    """Data processing: the divergence grows with k, and with all tokens it is the full one."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 12, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    order = teacher.argsort(descending=True)
    student, teacher = student.gather(-1, order), teacher.gather(-1, order)
    full = DIVERGENCES[name](student, teacher)
    found = [DIVERGENCES[name](with_tail(student[:, :k]), with_tail(teacher[:, :k])) for k in (1, 4, 8, 12)]
    assert all((later - earlier > -1e-12).all() for earlier, later in pairwise(found))
    torch.testing.assert_close(found[-1], full, atol=1e-12, rtol=0)
    assert (full > 0).all() and DIVERGENCES[name](teacher, teacher).abs().max() < 1e-15


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [3, 11])
def test_gradients_are_those_of_finite_differences(name: str, k: int) -> None:
    """Through the head as well, whole (k = V: the tail is held) and in chunks."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    top = torch.randn(7, 11, dtype=torch.float64).log_softmax(-1).topk(k)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, _ = chunked_logp(
            hidden, top.indices, Linear(weight, None), vocabulary=11, temperature=0.7, chunk_elements=22
        )
        return DIVERGENCES[name](with_tail(logp), with_tail(top.values)).sum()

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("make", [Linear, lambda weight, bias: lambda hidden: hidden @ weight.T + bias])
def test_several_targets_of_a_token_are_each_of_them_alone(make: object) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (11, 6), (11,)))
    target = torch.randint(11, (5, 3))  # one of them twice, as it may be
    target[0] = target[0, 0]
    both, _ = chunked_logp(hidden, target, make(weight, bias), vocabulary=11, chunk_elements=22)  # type: ignore[operator]
    scale = torch.arange(15).view(5, 3)
    found = torch.autograd.grad((both * scale).sum(), (hidden, weight, bias))
    alone = torch.stack([token_logp(hidden @ weight.T + bias, target[:, j]) for j in range(3)], -1)
    torch.testing.assert_close(both, alone)
    for left, right in zip(found, torch.autograd.grad((alone * scale).sum(), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def read(trainer: LocalTrainer, atoms: list[Atom], k: int, **how: object) -> list[Atom]:
    """The atoms with what a trainer's model says of them."""
    rows = [replace(row, columns={}) for atom in atoms for row in atom.rows]
    said = trainer.forward(rows, "top_k", top_k=k, **how)  # type: ignore[arg-type]
    columns = [{name: said[name][i] for name in said} for i in range(len(rows))]
    return [Atom(rows=(row.with_columns(**each),)) for row, each in zip(rows, columns, strict=True)]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [4, V])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str, k: int) -> None:
    trainer = tiny_trainer()
    objective = Distillation(divergence=DIVERGENCES[name], temperature=0.8)
    metrics = trainer.forward_backward(weigh_again(read(trainer, random_atoms(), k, temperature=0.8)), objective)
    assert abs(metrics["loss"].mean) < 1e-14
    assert all(not grad.abs().max() > 1e-14 for grad in gradients(trainer).values())


def test_with_the_whole_vocabulary_it_is_the_full_divergence() -> None:
    """Of another model's logits, by autograd over all of them."""
    trainer, teacher = tiny_trainer(), LocalTrainer(tiny_model(seed=1), tiny_trainer().config)
    atoms = weigh_again(read(teacher, random_atoms(), V, temperature=0.8))
    trainer.forward_backward(atoms, Distillation(divergence=forward_kl, temperature=0.8))
    found = gradients(trainer)
    packed = pack(atoms, trainer.model.device)
    states = (each.model.stream(packed)[packed.source_T] for each in (teacher, trainer))
    logits = [each.model.logits(state) / 0.8 for each, state in zip((teacher, trainer), states, strict=True)]
    p_TV, q_TV = logits[0].detach().log_softmax(-1), logits[1].log_softmax(-1)
    weight_T = torch.from_numpy(np.concatenate([row.columns["weight"] for atom in atoms for row in atom.rows]))
    total = (weight_T * (p_TV.exp() * (p_TV - q_TV)).sum(-1)).sum()
    total.backward()
    assert largest_difference(gradients(trainer), found) < 1e-9


def test_the_sampled_token_estimates_the_reverse_kl() -> None:
    """Over all tokens, weighed by the student's own p, -A log p has the gradient of KL(student || teacher)."""
    torch.manual_seed(0)
    z = torch.randn(9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, dtype=torch.float64).log_softmax(-1)
    logp = z.log_softmax(-1)
    advantage = -(logp.detach() - teacher)
    surrogate = -(logp.detach().exp() * advantage * logp).sum()
    full = reverse_kl(z.log_softmax(-1)[None], teacher[None]).sum()
    torch.testing.assert_close(*(torch.autograd.grad(each, z)[0] for each in (surrogate, full)))


def test_a_teacher_beside_its_student_reads_as_it_does_alone(tmp_path: Path) -> None:
    teacher = tiny_model(seed=1)
    alone, student = LocalTrainer(teacher, tiny_trainer().config), tiny_trainer()
    beside = LocalTrainer(student.model, student.config, {TEACHER: teacher})
    for left, right in zip(
        read(alone, random_atoms(), 5), read(beside, random_atoms(), 5, frozen=TEACHER), strict=True
    ):
        assert left == right
