"""What rests on the host changes no number; with a CPU on both sides the same copies are made."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.laws.support import logps_of, random_atoms, tiny_model
from whet.algorithms.sft import CrossEntropy
from whet.cli.app import app
from whet.config import CreateConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.launch.memory import footprint
from whet.training import offload, optim
from whet.training.engine import LocalTrainer

ROWS = [row for atom in random_atoms() for row in atom.rows]
BOTH = ["optimizer", "reference"]


def trainer(optimizer: str, offloaded: list[str]) -> LocalTrainer:
    config = TrainConfig.model_validate(
        {"optimizer": optimizer, "offload": offloaded, "weight_decay": 0.1, "lr": 1e-2, "muon_lr": 1e-2}
    )
    return LocalTrainer(tiny_model(dtype=torch.float32), config, {"reference": tiny_model(dtype=torch.float32)})


def learn(trainer: LocalTrainer, steps: range) -> list[Any]:
    seen = []
    for step in steps:
        seen.append(trainer.forward_backward(random_atoms(seed=step), CrossEntropy())["loss"])
        trainer.optim_step(1.0)
        if step == 1:
            trainer.update_frozen("reference", 0.5)
        seen.append(logps_of(trainer, ROWS, frozen="reference"))
    return seen


def equal(left: LocalTrainer, right: LocalTrainer) -> bool:
    ours, theirs = left.optimizers.state(), right.optimizers.state()
    weights = zip(left.model.parameters.values(), right.model.parameters.values(), strict=True)
    assert ours.keys() == theirs.keys() and ours
    return all(torch.equal(ours[k], theirs[k]) for k in ours) and all(torch.equal(p, q) for p, q in weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_offloading_changes_no_number(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PART_NUMBERS", 3000)
    plain, away = trainer(optimizer, []), trainer(optimizer, BOTH)
    assert len(away.optimizers.adamw) + len(away.optimizers.muon) > 4
    assert learn(plain, range(3)) == learn(away, range(3)) and equal(plain, away)
    # A checkpoint of either is one of the other.
    away.save(tmp_path)
    resumed = {name: trainer(optimizer, offloaded) for name, offloaded in (("plain", []), ("away", BOTH))}
    for again in resumed.values():
        again.load(tmp_path)
    expected = learn(plain, range(3, 5))
    assert all(learn(again, range(3, 5)) == expected and equal(again, plain) for again in resumed.values())


def test_one_part_visits_at_a_time_and_everything_goes_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PART_NUMBERS", 3000)
    away = trainer("adamw", BOTH)
    learn(away, range(1))
    homes = {name: tensor.data_ptr() for name, tensor in away.optimizers.state().items()}
    visits: list[int] = []
    step = torch.optim.AdamW.step

    def counted(optimizer: torch.optim.AdamW) -> None:
        state = away.optimizers.state()
        visits.append(sum(tensor.nbytes for name, tensor in state.items() if tensor.data_ptr() != homes[name]))
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    away.forward_backward(random_atoms(), CrossEntropy())
    away.optim_step(1.0)
    everything = sum(tensor.nbytes for tensor in away.optimizers.state().values())
    assert sum(visits) == everything and max(visits) == away.optimizers.largest_on_device() < everything / 2
    assert {name: tensor.data_ptr() for name, tensor in away.optimizers.state().items()} == homes


def test_the_reference_visits_for_its_pass() -> None:
    module = tiny_model(dtype=torch.float32).module
    offload.offload(module)
    homes = [p.data_ptr() for p in module.parameters()]
    with suppress(torch.OutOfMemoryError), offload.on_device(module, torch.device("cpu")):
        assert all(p.data_ptr() != home for p, home in zip(module.parameters(), homes, strict=True))
        raise torch.OutOfMemoryError
    assert [p.data_ptr() for p in module.parameters()] == homes


def test_the_plan_of_a_gpu_reckons_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("whet.launch.memory", "whet.models.footprint"):
        monkeypatch.setattr(f"{room}.pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**30, 2**34))
    monkeypatch.setattr(optim, "PART_NUMBERS", 2**18)
    create = CreateConfig(hidden_size=256, layers=4, heads=4, kv_heads=2, intermediate_size=768)
    model = ModelConfig(path="whet:tiny", create=create)
    plain, away = (
        footprint("rl", model, TrainConfig.model_validate({"microbatch_tokens": 512, "offload": what}),
                  SamplingConfig(), reference=True)
        for what in ([], BOTH)
    )  # fmt: skip
    # fp32: 4 bytes of gradient and 8 of AdamW's moments for each parameter, of which the first are left.
    assert away.optimizer == pytest.approx(plain.optimizer / 3, rel=0.01)
    policy, reference = away.roles
    assert reference.weights == 0 and away.weights == policy.weights == plain.weights / 2
    # What comes and goes is counted where it is at its peak: the whole reference, and a pass without a gradient.
    assert policy.weights < reference.work < policy.weights + plain.roles[0].work
    assert policy.work >= plain.roles[0].work


def test_what_cannot_be_moved_is_refused_in_a_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nmodel: {path: 'whet:tiny', device: cpu}\nstages:\n"
        "  sft: {kind: sft, data: {generate: arithmetic, count: 4, digits: 1}, train: {offload: [optimizer]}}\n"
    )
    for command in (["plan", str(recipe), "--memory"], ["run", str(recipe), f"out={tmp_path / 'run'}"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code != 0 and not (tmp_path / "run").exists()
        shown = " ".join((result.output + str(result.exception)).split())
        assert "stages.sft.train.offload: moves memory from a GPU to the host" in shown
    with pytest.raises(ValueError, match="adapter off; leave reference out"):
        TrainConfig.model_validate({"offload": BOTH, "lora": {"rank": 4}})
    with pytest.raises(ValueError, match="bitsandbytes' state"):
        TrainConfig.model_validate({"offload": ["optimizer"], "optimizer": "adamw8bit"})
