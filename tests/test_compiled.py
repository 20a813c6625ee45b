"""Compiled layers compute what eager ones do, and a resumed run goes on with the same bits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.laws.support import gradients, largest_difference, random_atoms
from whet.algorithms.sft import CrossEntropy
from whet.config import CreateConfig, ModelConfig, TrainConfig
from whet.errors import ModelError
from whet.models import matmul
from whet.models.load import load_model
from whet.training.engine import LocalTrainer

MODEL = ModelConfig(
    path="whet:tiny",
    device="cpu",
    create=CreateConfig(hidden_size=64, layers=1, heads=2, kv_heads=1, intermediate_size=64, max_length=128),
)
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU"
)


def trainer(*, compiled: bool) -> LocalTrainer:
    return LocalTrainer(load_model(MODEL, compiled=compiled), TrainConfig(lr=1e-2))


def learn(trainer: LocalTrainer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(trainer.forward_backward(random_atoms(seed=step), CrossEntropy())["loss"].total)
        trainer.optim_step(1.0)
    return losses


@needs_compiler
def test_compiled_layers_are_the_eager_ones_at_any_length_and_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.backends.mkldnn.is_available():  # the products that a compiler must not look into
        monkeypatch.setattr(matmul, "_in_use", "onednn")
        monkeypatch.setattr(matmul, "LEAST", 0)
    compiled, eager = trainer(compiled=True), trainer(compiled=False)  # a model loaded later changes nothing
    torch._dynamo.utils.counters.clear()
    for seed, groups in ((0, 4), (1, 2), (2, 6)):
        both = []
        for each in (compiled, eager):
            each.forward_backward(random_atoms(groups, seed=seed), CrossEntropy())
            both.append(gradients(each))
        assert largest_difference(*both) < 1e-5 * max(float(g.abs().max()) for g in both[1].values())
    # One break, at attention; what came with other lengths was compiled already.
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1, "\n".join(torch._dynamo.utils.counters["graph_break"])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4
    learn(compiled, range(2))
    compiled.save(tmp_path)
    expected = learn(compiled, range(2, 4))
    torch._dynamo.reset()  # as in a new process
    again = trainer(compiled=True)
    again.load(tmp_path)
    assert learn(again, range(2, 4)) == expected


@pytest.mark.parametrize("other", [{"lora": {"rank": 4}}, {"gradient_checkpointing": True}])
def test_what_it_was_not_checked_with_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="compile: checked with plain layers only"):
        TrainConfig.model_validate({"compile": True, **other})


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match="needs a C\\+\\+ compiler on a CPU, and there is no no-such-compiler"):
        load_model(MODEL, compiled=True)
