"""Running out of memory changes how a step is cut, and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.support import gradients, largest_difference, logps_of, random_atoms, tiny_trainer
from whet.algorithms.sft import CrossEntropy
from whet.errors import RunError, TrainingError
from whet.records import Atom, add_metrics
from whet.training.engine import CPU_MESSAGE, LocalTrainer, TokenBudget, attempt

ERRORS = {"cuda": torch.OutOfMemoryError("CUDA out of memory"), "cpu": RuntimeError(f"{CPU_MESSAGE}: you tried")}
LOWER, UPPER = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"


@contextmanager
def failing(trainer: LocalTrainer, where: str, calls: set[int], error: Exception) -> Iterator[list[int]]:
    """Raise at these calls: before the forward pass, or when the gradient of a parameter is ready."""
    counted = [0]

    def count(*_: Any) -> None:
        counted[0] += 1
        if counted[0] in calls:
            raise error

    if where == "forward":
        hook = trainer.model.module.get_decoder().register_forward_pre_hook(count)
    else:
        hook = trainer.model.parameters[where].register_hook(count)
    yield counted
    hook.remove()


@pytest.fixture(scope="module")
def trainer() -> LocalTrainer:
    return tiny_trainer()


@pytest.mark.parametrize("where", ["forward", LOWER, UPPER, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("calls", [{1}, {1, 2}, {2}])
def test_the_gradient_is_exact_wherever_memory_ran_out(trainer: LocalTrainer, where: str, calls: set[int]) -> None:
    atoms, others = random_atoms(groups=6), random_atoms(seed=5)
    trainer.budget = TokenBudget(10_000)
    expected_metrics = trainer.forward_backward(others, CrossEntropy())
    trainer.forward_backward(atoms, CrossEntropy())
    expected = gradients(trainer)
    cost = sum(atom.cost for atom in atoms)
    trainer.forward_backward(others, CrossEntropy())  # gradients that are there already must stay
    trainer.budget = TokenBudget(cost if 1 in calls else cost // 2)
    with failing(trainer, where, calls, ERRORS["cpu" if 2 in calls else "cuda"]):
        metrics = trainer.forward_backward(atoms, CrossEntropy())
    assert largest_difference(gradients(trainer), expected) < 1e-12
    assert metrics["oom_retries"].total == len(calls)
    assert add_metrics(metrics, expected_metrics)["loss"].weight == _trained(atoms) + _trained(others)


def test_what_was_learnt_of_the_machine_is_kept(trainer: LocalTrainer) -> None:
    atoms, trainer.budget = random_atoms(groups=6), TokenBudget(10_000)
    cost = sum(atom.cost for atom in atoms)
    with failing(trainer, "forward", {1}, ERRORS["cuda"]) as calls:
        trainer.forward_backward(atoms, CrossEntropy())
        assert trainer.budget.tokens == cost // 2
        used = calls[0] - 1
        metrics = trainer.forward_backward(atoms, CrossEntropy())
    assert metrics["oom_retries"].total == 0
    assert calls[0] == 2 * used + 1


def test_a_resumed_stage_keeps_the_cut_that_it_had(tmp_path: Path) -> None:
    began, goes_on, asked_anew = (tiny_trainer(microbatch_tokens=tokens) for tokens in (300, 300, 500))
    began.budget.shrink(300, 2)
    began.save(tmp_path)
    for trainer, expected in ((goes_on, 150), (asked_anew, 500)):
        trainer.load(tmp_path)
        assert trainer.budget.tokens == expected


def test_a_stage_does_not_go_on_in_another_precision(tmp_path: Path) -> None:
    began, elsewhere = tiny_trainer(), tiny_trainer()
    elsewhere.model = replace(elsewhere.model, compute=torch.bfloat16)  # what `dtype: auto` takes on a GPU
    began.save(tmp_path)
    before = {name: p.clone() for name, p in elsewhere.model.parameters.items()}
    with pytest.raises(RunError, match=r"written in float32, and here the model computes in bfloat16.*model\.dtype"):
        elsewhere.load(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in elsewhere.model.parameters.items())


def test_a_budget_that_shrinks_holds_for_the_rest_of_the_call() -> None:
    budget = TokenBudget(100)
    runs = budget.fill([50, 50, 50, 50, 50])
    assert next(runs) == [0, 1]
    budget.shrink(100, 2)
    assert list(runs) == [[2], [3], [4]]


def test_reading_survives_too(trainer: LocalTrainer) -> None:
    atoms = random_atoms()
    rows = [row for atom in atoms for row in atom.rows]
    trainer.budget = TokenBudget(10_000)
    expected, loss = logps_of(trainer, rows), trainer.evaluate(atoms, CrossEntropy())["loss"].mean
    with failing(trainer, "forward", {1, 3}, ERRORS["cpu"]):
        found = logps_of(trainer, rows)
    assert trainer.budget.retries == 2
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, abs=1e-12)
    trainer.budget = TokenBudget(10_000)
    with failing(trainer, "forward", {1}, ERRORS["cpu"]):
        assert trainer.evaluate(atoms, CrossEntropy())["loss"].mean == pytest.approx(loss, abs=1e-12)


def test_one_atom_that_does_not_fit_is_the_users_to_mend(trainer: LocalTrainer) -> None:
    trainer.budget = TokenBudget(10_000)
    with (
        failing(trainer, "forward", set(range(50)), ERRORS["cuda"]),
        pytest.raises(TrainingError, match="cannot be cut further"),
    ):
        trainer.forward_backward(random_atoms(), CrossEntropy())


def test_other_errors_pass() -> None:
    def broken() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        attempt(broken)


def test_a_failed_attempt_holds_nothing() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def hungry() -> None:
        tensor = torch.ones(10)
        alive.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    assert attempt(hungry) is None
    assert alive[0]() is None


def _trained(atoms: list[Atom]) -> int:
    return sum(row.trained_count for atom in atoms for row in atom.rows)
