"""Four-bit weights and eight-bit moments, by bitsandbytes where it is installed (`pip install 'whet[quant]'`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.laws.support import SHAPE, logps_of, random_atoms
from whet.algorithms.sft import CrossEntropy
from whet.config import CreateConfig, LoraConfig, ModelConfig, TrainConfig
from whet.errors import MissingExtra, ModelError
from whet.launch.memory import footprint
from whet.models.load import load_model
from whet.models.quantize import bitsandbytes
from whet.training.engine import LocalTrainer
from whet.training.optim import eight_bit_state

LORA = LoraConfig(rank=4)
ROWS = [row for atom in random_atoms() for row in atom.rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("bitsandbytes", reason="pip install 'whet[quant]'")
    folder = tmp_path_factory.mktemp("plain")
    load_model(ModelConfig(path="whet:tiny", create=SHAPE)).export(folder)
    return str(folder)


def trainer(folder: str, *, quantised: bool = True, optimizer: str = "adamw8bit") -> LocalTrainer:
    torch.manual_seed(0)
    model = load_model(ModelConfig(path=folder), lora=LORA, quantised=quantised)
    config = {
        "lora": LORA,
        "quantize": "nf4" if quantised else None,
        "optimizer": optimizer,
        "clip_norm": None,
        "lr": 1e-2,
    }
    return LocalTrainer(model, TrainConfig.model_validate(config))


def learn(trainer: LocalTrainer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(trainer.forward_backward(random_atoms(seed=step % 2), CrossEntropy())["loss"].total)
        trainer.optim_step(1.0)
    return losses


def test_an_adapter_learns_over_four_bits_and_only_it(folder: str) -> None:
    ours = trainer(folder)
    quantised = [p for p in ours.model.module.parameters() if p.dtype == torch.uint8]
    assert len(quantised) == 2 * 7  # seven matrices in each of two layers
    before = [p.clone() for p in quantised]
    losses = learn(ours, range(12))
    assert losses[-2] < 0.98 * losses[0] and losses[-1] < 0.98 * losses[1]
    assert all(torch.equal(p, was) for p, was in zip(quantised, before, strict=True))


def test_four_bits_are_near_the_weights_and_not_at_them(folder: str) -> None:
    rounded, exact = (logps_of(trainer(folder, quantised=q), ROWS) for q in (True, False))
    gaps = [abs(x - y) for left, right in zip(rounded, exact, strict=True) for x, y in zip(left, right, strict=True)]
    assert 1e-4 < max(gaps) < 0.2


def test_a_resumed_trainer_goes_on_bit_for_bit(folder: str, tmp_path: Path) -> None:
    one = trainer(folder)
    learn(one, range(3))
    one.save(tmp_path)
    other = trainer(folder)
    other.load(tmp_path)
    assert learn(one, range(3, 6)) == learn(other, range(3, 6))


def test_what_is_exported_is_what_was_trained(folder: str, tmp_path: Path) -> None:
    ours = trainer(folder)
    learn(ours, range(3))
    ours.export(tmp_path)
    found = logps_of(ours, ROWS)
    again = logps_of(LocalTrainer(load_model(ModelConfig(path=str(tmp_path))), TrainConfig()), ROWS)
    for left, right in zip(found, again, strict=True):
        assert left == pytest.approx(right, abs=1e-4)
    assert found == logps_of(ours, ROWS)  # exporting changes nothing


def test_moments_in_eight_bits_take_a_quarter(folder: str) -> None:
    sizes = {}
    for optimizer in ("adamw", "adamw8bit"):
        ours = LocalTrainer(
            load_model(ModelConfig(path="whet:tiny", create=CreateConfig(hidden_size=128, layers=1))),
            TrainConfig.model_validate({"optimizer": optimizer}),
        )
        learn(ours, range(1))
        state = ours.optimizers.state()
        tables = sum(tensor.nbytes for name, tensor in state.items() if name.endswith(("qmap1", "qmap2")))
        sizes[optimizer] = sum(tensor.nbytes for tensor in state.values()) - tables
        planned = sum(eight_bit_state(p.numel()) for p in ours.model.parameters.values())
    assert sizes["adamw8bit"] == pytest.approx(planned, rel=0.01)
    assert 0.25 < sizes["adamw8bit"] / sizes["adamw"] < 0.28


def test_the_plan_knows_both() -> None:
    create = CreateConfig(hidden_size=256, layers=4, heads=4, kv_heads=2, intermediate_size=768)
    model = ModelConfig(path="whet:tiny", create=create)
    matrices = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
    lora, qlora, light, plain = (
        footprint("sft", model, TrainConfig.model_validate({"microbatch_tokens": 256, **train}), None)
        for train in (
            {"lora": {"rank": 4}},
            {"lora": {"rank": 4}, "quantize": "nf4"},
            {"optimizer": "adamw8bit"},
            {},
        )
    )
    assert lora.weights - qlora.weights == pytest.approx(matrices * (4 - 0.516), rel=0.001)
    # Gradients stay: 4 of 12 bytes; moments fall from 8 bytes to a little over 2.
    assert 0.5 < light.optimizer / plain.optimizer < 0.53
    assert light.work == pytest.approx(plain.work, rel=0.05)


def test_a_model_that_is_made_has_nothing_to_quantise() -> None:
    with pytest.raises(ModelError, match="nothing to quantise"):
        load_model(ModelConfig(path="whet:tiny", create=SHAPE), lora=LORA, quantised=True)


def test_without_the_library_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"train.optimizer: adamw8bit needs .*pip install 'whet\[quant\]'"):
        LocalTrainer(
            load_model(ModelConfig(path="whet:tiny", create=SHAPE)),
            TrainConfig.model_validate({"optimizer": "adamw8bit"}),
        )
    with pytest.raises(MissingExtra):
        bitsandbytes("a test")
