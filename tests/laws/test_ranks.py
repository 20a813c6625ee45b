"""Laws of several ranks: they compute what one process computes, and none of them fails alone.

One group of three processes and one of two serve the whole file; what they must equal is computed here, in float64.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError, Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.laws.forks import forked_ranks
from tests.laws.nursery import contents
from tests.laws.support import SHAPE, _widen_norms, largest_difference, random_atoms, tiny_model, tiny_trainer
from tests.laws.test_engine import OBJECTIVES, policy_atoms
from tests.laws.test_lag import marked
from tests.laws.test_resume import MODEL
from tests.laws.test_value import KINDS, judged_atoms
from whet.algorithms.groups import to_atoms
from whet.algorithms.preference import objective_of as preference_of
from whet.config import LossConfig, MachineConfig, ModelConfig
from whet.config.loading import load_recipe
from whet.errors import ConfigError, ModelError, RunError
from whet.files import read_json
from whet.formulas.step import REDUCTIONS
from whet.launch import main, ranked
from whet.launch.rank import AGAIN_S, _read
from whet.launch.ranked import RankedWorld
from whet.launch.ranks import Ranks, RankSetup, prove
from whet.launch.samplers import start_fleet
from whet.launch.world import LocalWorld
from whet.models.load import load_model
from whet.models.matmul import library
from whet.pipeline.lineage import UNDECIDED
from whet.pipeline.run import Run
from whet.records import Atom, Metric, TokenRow
from whet.sampling.fleet import Fleet
from whet.tracking.log import read_metrics
from whet.training.base import Objective, Outputs
from whet.training.checkpoint import newest_generation, read_tensors, save_generation
from whet.training.engine import LocalTrainer
from whet.training.group import GroupFailure, GroupTrainer, cut_atoms, spread
from whet.training.optim import whole
from whet.training.sharded import ShardedTrainer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0


def machine_of(ranks: int, **keys: Any) -> MachineConfig:
    return MachineConfig.model_validate({"trainer": {"gpus": ranks}, **keys})


def group_of(ranks: int) -> Ranks:
    setup = RankSetup(
        world=ranks, store=("", 0), device="cpu", threads=1, products=library(), frugal=False, collective_s=PATIENCE_S
    )  # fmt: skip
    return Ranks(machine_of(ranks), setup)


@pytest.fixture(scope="module", autouse=True)
def _forks() -> Iterator[None]:
    with forked_ranks():
        yield


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    found = {ranks: group_of(ranks) for ranks in (2, 3)}
    yield found
    for group in found.values():
        group.stop()


# ------------------------------------------------------------- what runs on the ranks, and here to compare with


def tiny(_: LocalWorld, train: dict[str, Any], kind: str = "policy") -> LocalTrainer:
    """A trainer of the laws, as `Rank.do_build` makes one; adapters that are not zero."""
    if kind in KINDS:
        trainer = KINDS[kind][0](**{"microbatch_tokens": 100, **train})
    else:
        trainer = tiny_trainer(**{"microbatch_tokens": 100, **train})
    if kind == "one key-value head":
        create = SHAPE.model_copy(update={"kv_heads": 1})
        module = load_model(ModelConfig(path="whet:tiny", create=create)).module.to(torch.float64)
        _widen_norms(module)
        trainer = LocalTrainer(replace(trainer.model, module=module), trainer.config)
    if kind == "with reference":
        trainer = LocalTrainer(trainer.model, trainer.config, {"reference": tiny_model(seed=1)})
    if "lora" in train:
        generator = torch.Generator().manual_seed(1)
        for p in trainer.model.parameters.values():
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10
    return trainer


def here(kind: str = "policy", **train: Any) -> LocalTrainer:
    return tiny(LocalWorld(), train, kind)


def take_gradient(trainer: LocalTrainer) -> dict[str, torch.Tensor]:
    """Every gradient, whole; they are forgotten."""
    found = {name: whole(p.grad).clone() for name, p in trainer.model.parameters.items() if p.grad is not None}
    trainer.optimizers.zero_grad()
    return found


def shards(trainer: ShardedTrainer) -> dict[str, int]:
    """How many numbers of each parameter this rank holds."""
    return {name: p.to_local().numel() for name, p in trainer.model.parameters.items()}  # type: ignore[attr-defined]


def process(_: ShardedTrainer) -> int:
    return os.getpid()


def build(
    group: Ranks,
    kind: str = "policy",
    *,
    replicate: int = 1,
    context: int = 1,
    most_tokens: int | None = None,
    **train: Any,
) -> GroupTrainer:
    group.start(PATIENCE_S)
    part = ("t", [], replicate, context, most_tokens, tiny, (train, kind), {})
    group.call("build", [part] * group.ranks, PATIENCE_S)
    return GroupTrainer(group, "t", deadline_s=PATIENCE_S, context=context)


def on_ranks(trainer: GroupTrainer, work: Any) -> list[Any]:
    return trainer.group.call("trainer", [("t", work)] * trainer.group.ranks, PATIENCE_S)


def weights(trainer: GroupTrainer | LocalTrainer, folder: Path) -> dict[str, torch.Tensor]:
    if isinstance(trainer, LocalTrainer):
        return {name: p.detach().clone() for name, p in trainer.model.parameters.items()}
    digest = trainer.gather(folder / "gathered.safetensors")
    assert len(digest) == 64
    return load_file(folder / "gathered.safetensors")


def rows_of(atoms: list[Atom]) -> list[TokenRow]:
    return [row for atom in atoms for row in atom.rows]


# ---------------------------------------------------------------------------------------------- the cut


def test_the_cut_is_even_whole_and_of_the_atoms_alone() -> None:
    assert spread([5, 5, 4, 3, 1], 2) == [[0, 2], [1, 3, 4]] and spread([7], 3) == [[0], [], []]
    atoms = random_atoms(groups=5, rows=8, seed=3)
    idle = Atom(rows=tuple(row.with_columns(weight=0.0) for row in atoms[0].rows))
    for ranks in (1, 2, 3, 7):
        cut = cut_atoms([*atoms, idle], ranks, together=False)
        found = sorted(row.tokens.tobytes() for part in cut.parts for atom in part for row in atom.rows)
        assert found == sorted(row.tokens.tobytes() for row in rows_of(atoms)), "each row once, weightless ones nowhere"
        loads = [sum(atom.cost for atom in part) for part in cut.parts]
        assert max(loads) <= 1.1 * sum(loads) / ranks
    kept = cut_atoms(atoms, 3, together=True)
    assert sorted(len(atom.rows) for part in kept.parts for atom in part) == [8] * 5
    assert cut_atoms([idle], 2, together=False).idle is None
    waiting = cut_atoms(atoms, 3, together=False).idle  # no more than any rank computes at once, however small that is
    assert waiting is not None and waiting.cost == min(len(row.tokens) for row in rows_of(atoms))
    waiting = cut_atoms(atoms, 3, together=True).idle
    assert waiting is not None and waiting.cost == min(atom.cost for atom in atoms)


# --------------------------------------------------------------------------------- the same as one process


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gradient_is_that_of_one_process(ranks: int, groups: dict[int, Ranks]) -> None:
    """Every preset, on two ranks every fourth; atoms of unequal cost, so that ranks have unequal numbers of passes."""
    alone, together = here(), build(groups[ranks])
    for name, objective in list(OBJECTIVES.items())[:: 1 if ranks == 3 else 4]:
        # One atom too: its rows are spread, or a rank is idle.
        same_gradient(alone, together, policy_atoms()[: 1 + len(name) % 4], objective)
    owned = on_ranks(together, shards)
    total = {name: p.numel() for name, p in alone.model.parameters.items()}
    assert {name: sum(each[name] for each in owned) for name in total} == total, "nothing is held twice"


def same_gradient(alone: LocalTrainer, together: GroupTrainer, atoms: list[Atom], objective: Objective) -> None:
    metrics = [trainer.forward_backward(atoms, objective) for trainer in (alone, together)]
    expected, *found = take_gradient(alone), *on_ranks(together, take_gradient)
    tolerance = 1e-12 * max(1.0, *(float(g.abs().max()) for g in expected.values()))
    for gradient in found:
        assert largest_difference(gradient, expected) < tolerance
    for key in metrics[0]:
        both = (each[key].total if key.endswith("loss") else each[key].mean for each in metrics)
        assert next(both) == pytest.approx(next(both), rel=1e-9, abs=1e-12, nan_ok=True), key


def test_so_it_is_of_every_reduction_of_pairs_values_and_copies(groups: dict[int, Ranks]) -> None:
    together, alone = build(groups[3]), here()
    for reduce in REDUCTIONS.values():
        rows = rows_of(policy_atoms())
        written = reduce([row.trained_count for row in rows], [i // 3 for i in range(len(rows))], 32)
        atoms = to_atoms([row.with_columns(weight=w) for row, w in zip(rows, written, strict=True)])
        same_gradient(alone, together, atoms, OBJECTIVES["grpo"])
    pairs = [Atom(rows=tuple(row.with_columns(weight=0.2) for row in atom.rows)) for atom in random_atoms(5, 2)]
    same_gradient(alone, together, pairs, preference_of(LossConfig.model_validate("dpo")))
    same_gradient(alone, build(groups[3], replicate=3), atoms, OBJECTIVES["grpo"])
    for kind, (_, objective) in KINDS.items():
        same_gradient(here(kind), build(groups[3], kind), judged_atoms(), objective)


def test_ranks_that_share_their_rows_have_the_gradient_of_one_process(groups: dict[int, Ranks]) -> None:
    """Context 2: each rank has half the tokens of packed rows with shared prompts, and half the heads."""
    together, alone = build(groups[2], context=2), here()
    for name, objective in OBJECTIVES.items():
        if name in ("sft", "grpo", "gspo", "ppo", "cispo", "entropy", "reverse_kl"):
            same_gradient(alone, together, policy_atoms()[: 1 + len(name) % 4], objective)
    short = TokenRow(tokens=np.array([1, 2]), trained=np.array([False, True])).with_columns(weight=0.5)
    same_gradient(alone, together, [Atom(rows=(short,))], OBJECTIVES["sft"])
    lone = TokenRow(tokens=np.array([1]), trained=np.array([False]))
    assert [len(column) for column in together.forward([lone], "logp")["logp"]] == [0], "a rank without a token"
    pairs = [Atom(rows=tuple(row.with_columns(weight=0.2) for row in atom.rows)) for atom in random_atoms(5, 2)]
    same_gradient(alone, together, pairs, preference_of(LossConfig.model_validate("dpo")))
    rows = rows_of(random_atoms(groups=3, rows=4))
    reads = [each.forward(rows, "logp", "entropy", "top_k", top_k=3) for each in (alone, together)]
    for name, columns in reads[0].items():
        for ours, theirs in zip(reads[1][name], columns, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    for how in ({"lora": {"rank": 2}}, {"gradient_checkpointing": True}, {"kind": "one key-value head"}):
        same_gradient(here(**how), build(groups[2], context=2, **how), policy_atoms(), OBJECTIVES["grpo"])
    for kind, (_, objective) in KINDS.items():
        same_gradient(here(kind), build(groups[2], kind, context=2), judged_atoms(), objective)
    both = here("separate"), build(groups[2], "separate", context=2)
    read = [each.forward(rows, "value", "score") for each in both]
    for name, columns in read[0].items():
        for ours, theirs in zip(read[1][name], columns, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    with pytest.raises(ModelError, match=r"context is 3, and 4 heads over 2 key-value heads cannot be divided so"):
        build(groups[3], context=3)


def budget(trainer: ShardedTrainer) -> int:
    return trainer.budget.tokens


def test_auto_counts_tokens_for_each_rank_of_a_context(groups: dict[int, Ranks], tmp_path: Path) -> None:
    """Which take them together; a checkpoint of another context has those of each, what the recipe counts is kept."""
    for context in (2, 1):
        together = build(groups[2], context=context, microbatch_tokens="auto")
        assert on_ranks(together, budget) == [2048 * context] * 2
        if context == 2:
            together.save(tmp_path)
        together.load(tmp_path)
        assert on_ranks(together, budget) == [2048 * context] * 2
    assert on_ranks(build(groups[2], context=2, microbatch_tokens=300), budget) == [300] * 2


def test_ranks_of_one_context_get_the_same_rows_and_count_once() -> None:
    class Four:
        ranks, sent = 4, list[Any]()

        def call(self, verb: str, parts: Any, deadline_s: float) -> list[Any]:
            self.sent = list(parts)
            return [{"loss": Metric(1.0, 1.0)}] * 4

    group = Four()
    found = GroupTrainer(group, "t", deadline_s=1, context=2).evaluate(random_atoms(4, 1), OBJECTIVES["sft"])  # type: ignore[arg-type]
    atoms = [part[2] for part in group.sent]
    assert found["loss"].total == 2 and atoms[0] is atoms[1] and atoms[2] is atoms[3] and atoms[0] != atoms[2]


STEPS = {
    "adamw": {},
    "muon": {"optimizer": "muon", "weight_decay": 0.1, "clip_norm": 0.5},
    "lora": {"lora": {"rank": 2}, "clip_norm": 0.5},
    "dora": {"lora": {"rank": 2, "dora": True}},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_one_process(name: str, groups: dict[int, Ranks], tmp_path: Path) -> None:
    """With reads in between, of an adapter's base too: what an update made old must not be computed with."""
    atoms, alone, together = policy_atoms(), here(**STEPS[name]), build(groups[2], **STEPS[name])
    rows, of = rows_of(atoms), "reference" if "lora" in STEPS[name] else None
    for _ in range(2):
        for trainer in (alone, together):
            trainer.forward(rows, "logp", frozen=of)
            trainer.forward_backward(atoms, OBJECTIVES["dapo"])
            trainer.forward(rows, "logp")
        steps = [trainer.optim_step(0.5) for trainer in (alone, together)]
        assert steps[0].applied and steps[1].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-12)
        read = [trainer.forward(rows, "logp", "entropy")["logp"] for trainer in (alone, together)]
        assert max(abs(a - b).max() for a, b in zip(*read, strict=True)) < 1e-11
    assert largest_difference(weights(together, tmp_path), weights(alone, tmp_path)) < 1e-12


def test_reads_keep_their_order_and_a_rank_may_have_none(groups: dict[int, Ranks]) -> None:
    alone, together = here("with reference"), build(groups[3], "with reference")
    rows = rows_of(random_atoms(groups=3, rows=4))
    for some in (rows, rows[:1], []):
        for frozen in (None, "reference"):
            want: dict[str, Any] = {"temperature": 0.7, "frozen": frozen, "top_k": 4}
            expected = alone.forward(some, "logp", "entropy", "top_k", **want)
            found = together.forward(some, "logp", "entropy", "top_k", **want)
            assert found.keys() == expected.keys()
            for name in expected:
                assert [column.shape for column in found[name]] == [column.shape for column in expected[name]]
                for ours, theirs in zip(found[name], expected[name], strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    for trainer in (alone, together):
        trainer.update_frozen("reference", 0.25)
    moved = [trainer.forward(rows, "logp", frozen="reference")["logp"] for trainer in (alone, together)]
    assert max(abs(a - b).max() for a, b in zip(*moved, strict=True)) < 1e-12


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(groups: dict[int, Ranks], tmp_path: Path) -> None:
    together = build(groups[2])
    before, atoms = weights(together, tmp_path), random_atoms(2, 1)
    spoilt = [atoms[0], Atom(rows=(atoms[1].rows[0].with_columns(advantage=np.nan),))]
    together.forward_backward(spoilt, OBJECTIVES["grpo"])
    result = together.optim_step(1.0)
    assert not result.applied and np.isnan(result.grad_norm) and result.not_finite
    assert largest_difference(weights(together, tmp_path), before) == 0
    together.forward_backward(atoms, OBJECTIVES["grpo"])
    assert together.optim_step(1.0).applied, "and the next one is as if nothing had been"


# ------------------------------------------------------------------------------------------- checkpoints


def one_step(trainer: GroupTrainer | LocalTrainer, number: int) -> None:
    trainer.forward_backward(policy_atoms()[number % 4 :], OBJECTIVES["grpo"])
    trainer.optim_step(1.0)


@pytest.mark.parametrize("train", [{"optimizer": "muon"}, {"lora": {"rank": 2}}], ids=["muon", "lora"])
def test_any_number_of_ranks_goes_on_from_any_other(
    train: dict[str, Any], groups: dict[int, Ranks], tmp_path: Path
) -> None:
    """1 -> 3 -> 2 -> 1 ranks, a step on each, the frozen copy's EMA too: the steps of one process without a stop."""
    kind = "policy" if "lora" in train else "with reference"
    alone = here(kind, **train)
    chain = [here(kind, **train), *(build(groups[n], kind, **train) for n in (3, 2)), here(kind, **train)]
    for number, trainer in enumerate(chain):
        if number:
            generation = newest_generation(tmp_path / "ck")
            assert generation is not None and generation.step == number - 1
            trainer.load(generation.folder)
        for each in (alone, trainer):
            one_step(each, number)
            if kind == "with reference":
                each.update_frozen("reference", 0.5)
        save_generation(tmp_path / "ck", number, {}, trainer.save, keep=9)
        trainer.export(tmp_path / f"model-{number}")
    assert largest_difference(weights(chain[-1], tmp_path), weights(alone, tmp_path)) < 1e-12
    if kind == "with reference":
        frozen = [each.frozen["reference"].module.state_dict() for each in (alone, chain[-1])]
        assert largest_difference(*frozen) < 1e-12
    # A model from one, two and three ranks, bitwise equal.
    for n in (2, 3):
        other = build(groups[n], kind, **train)
        other.load(tmp_path / "ck" / "step-00000003")
        other.export(tmp_path / f"again-{n}")
        written = sorted(p.relative_to(tmp_path / "model-3") for p in (tmp_path / "model-3").rglob("*") if p.is_file())
        assert Path("model.safetensors") in written
        for name in filter(lambda name: name.suffix == ".safetensors", written):
            assert (tmp_path / f"again-{n}" / name).read_bytes() == (tmp_path / "model-3" / name).read_bytes(), name


def test_a_missing_or_damaged_shard_is_named(groups: dict[int, Ranks], tmp_path: Path) -> None:
    together = build(groups[2])
    for step in (1, 2, 3):
        one_step(together, step)
        save_generation(tmp_path, step, {}, together.save, keep=3)
    shard = tmp_path / "step-00000003" / "ranks" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / "step-00000002" / "ranks" / "__0_0.distcp").unlink()
    found = newest_generation(tmp_path)
    assert found is not None and found.step == 1
    assert "step-00000003/ranks/__1_0.distcp: damaged" in found.passed_over[0]
    assert "step-00000002/ranks/__0_0.distcp: missing" in found.passed_over[1]
    (tmp_path / "step-00000001" / "ranks" / "__1_0.distcp").unlink()
    with pytest.raises(RunError, match="no checkpoint can be used"):
        newest_generation(tmp_path)


def test_an_index_that_would_run_something_is_refused(tmp_path: Path) -> None:
    """A sealed generation may come from anybody."""
    mark = tmp_path / "mark"
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / ".metadata").write_bytes(b"cos\nmkdir\n(S'" + bytes(mark) + b"'\ntR.")
    with pytest.raises(RunError, match=r"names os\.mkdir, which no checkpoint of whet does"):
        read_tensors(tmp_path, ["weights"], lambda kind, name: None)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------ faults


@dataclass(frozen=True)
class Hungry:
    """An objective for whose micro-batches of more than so many rows memory runs out."""

    rows: int
    needs: frozenset[Any] = frozenset()
    temperature: float = 1.0
    compares: bool = False

    def __call__(self, outputs: Outputs, batch: Any) -> Any:
        """-log p, if there is memory."""
        if batch.rows > self.rows:
            raise torch.OutOfMemoryError("allocator")
        return -(batch.weight_T * outputs.logp_T).sum(), {}


def test_where_memory_runs_out_the_group_ends_and_says_what_may_fit(groups: dict[int, Ranks]) -> None:
    group, tokens = groups[2], np.arange(20)
    rows = [TokenRow(tokens=tokens + i, trained=tokens > 0).with_columns(weight=0.1) for i in range(11)]
    atoms = [Atom(rows=(row,)) for row in rows]
    with pytest.raises(GroupFailure, match=r"rank \d: out of memory.*after the command 'forward_backward'") as met:
        build(group, microbatch_tokens=80).forward_backward(atoms, Hungry(rows=2))
    assert met.value.most_tokens == 40
    again = build(group, microbatch_tokens=80, most_tokens=met.value.most_tokens)  # new processes
    same_gradient(here(microbatch_tokens=1), again, atoms, Hungry(rows=2))


RECIPE = """
name: whole
seed: 2
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
save: {every: 2}
stages:
  sft:
    kind: sft
    data: {generate: arithmetic, count: 20, digits: 1}
    eval_data: {generate: arithmetic, count: 6, digits: 1, split: test}
    eval_every: 2
    train: {optimizer: muon, lr: 0.01, batch_size: 8, steps: 5, schedule: cosine, warmup: 2}
  rl:
    kind: rl
    tasks: {generate: arithmetic, count: 24, digits: 1}
    rewards: [{kind: verifier}, {kind: overlong, cache_tokens: 10}, {kind: length, above_tokens: 8, weight: 0}]
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {max_tokens: 12, max_running: 10}
    algorithm:
      preset: ppo
      kl: {coefficient: 0.05, update_every: 2, ema_decay: 0.3}
    train: {lr: 0.003, steps: 4}
"""


LAGGING = f"""
name: lagging
seed: 2
model: {MODEL}
save: {{every: 2}}
machine: {{samplers: {{replicas: 2}}}}
stages:
  rl:
    kind: rl
    tasks: {{generate: arithmetic, count: 24, digits: 1}}
    rewards: [{{kind: verifier}}, {{kind: length, above_tokens: 8, weight: -1}}]
    algorithm: {{preset: decoupled_ppo, minibatches: 2}}
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {{max_tokens: 12, max_running: 10}}
    lag: {{steps: 1, order: exact}}
    train: {{lr: 0.003, steps: 5}}
"""


def run_on(group: Ranks | None, folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: str = RECIPE) -> Path:
    """The recipe in this folder; its ranks are those of a group that stays."""
    (folder / "r.yaml").parent.mkdir(parents=True, exist_ok=True)
    (folder / "r.yaml").write_text(recipe)
    words = [f"out={folder / 'run'}"]
    with monkeypatch.context() as patched:
        if group is not None:
            words.append(f"machine.trainer.gpus={group.ranks}")
            loaded = load_recipe(folder / "r.yaml", words)
            machine = loaded.recipe.machine
            world = RankedWorld(folder=folder / "run", group=group, machine=machine)
            patched.setattr(RankedWorld, "close", lambda self: None)
            patched.setattr(main, "build_world", lambda *_, **__: world)
        main.run_recipe(load_recipe(folder / "r.yaml", words), quiet=True)
    return folder / "run"


def numbers_of(run: Path, stage: str) -> list[dict[str, Any]]:
    kept = ("loss", "reward", "grad_norm", "num_tokens", "eval_loss", "value/loss", "kl")
    return [{key: step[key] for key in kept if key in step} for step in read_metrics(run / "stages" / stage)]


def test_a_recipe_on_two_ranks_one_of_which_is_killed(
    groups: dict[int, Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages are what one process makes, by identity and by numbers; the kill changes no bit of them."""
    alone = run_on(None, tmp_path / "1", monkeypatch)
    together = run_on(groups[2], tmp_path / "2", monkeypatch)
    for stage in ("01-sft", "02-rl"):
        ours, theirs = (read_json(run / "stages" / stage / "stage.json") for run in (alone, together))
        assert ours["identity"]["config"] == theirs["identity"]["config"]
        expected, found = numbers_of(alone, stage), numbers_of(together, stage)
        assert len(found) == len(expected) >= 4
        for before, after in zip(expected, found, strict=True):
            assert after == pytest.approx(before, rel=1e-3, abs=1e-5, nan_ok=True)
    victims = on_ranks(build(groups[2]), process)
    steps = iter(range(100))

    def fatal(self: GroupTrainer, lr_factor: float) -> Any:
        if next(steps) == 6:  # of the critic or the policy, after a checkpoint of the second stage
            os.kill(victims[1], signal.SIGKILL)
        return GroupTrainer._call(self, "optim_step", [(lr_factor,)] * 2)[0]

    monkeypatch.setattr(GroupTrainer, "optim_step", fatal)
    began = time.monotonic()
    killed = run_on(groups[2], tmp_path / "3", monkeypatch)
    assert time.monotonic() - began < PATIENCE_S
    assert [pid for pid in victims if Path(f"/proc/{pid}").exists()] == []
    for name in ("01-sft/model/model.safetensors", "02-rl/model/model.safetensors"):
        assert (killed / "stages" / name).read_bytes() == (together / "stages" / name).read_bytes()


def test_lag_and_ranks_together_whoever_is_killed(
    groups: dict[int, Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `exact` it has the numbers of one process with that lag, and the same bits though a sampler and a rank die."""
    group = groups[2]
    group.start(PATIENCE_S)
    monkeypatch.setenv("WHET_TEST_MARK", mark := f"ranks-{os.getpid()}-{tmp_path.name}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    alone = run_on(None, tmp_path / "1", monkeypatch, LAGGING)
    fleets, hand_overs = list[Fleet](), iter(range(100))

    def noted(*given: Any) -> Fleet | None:
        if (started := start_fleet(*given)) is not None:
            fleets.append(started)
        return started

    def fatal(self: GroupTrainer, path: Path) -> str:
        if (version := next(hand_overs)) in (2, 4):  # the checkpoint of step 4 is not there yet
            victims = [each.pid for each in fleets[-1].replicas if each.pid]
            os.kill(victims[0] if version == 2 else group._processes[1].pid, signal.SIGKILL)
        return str(GroupTrainer._call(self, "gather", [(path,)] * 2)[0])

    found = []
    for name in ("2", "3"):
        with monkeypatch.context() as patched:
            if name == "3":
                patched.setattr(ranked, "start_fleet", noted)
                patched.setattr(GroupTrainer, "gather", fatal)
            found.append(run_on(group, tmp_path / name, patched, LAGGING))
    together, killed = found
    expected, ours = numbers_of(alone, "01-rl"), numbers_of(together, "01-rl")
    assert len(ours) == len(expected) == 5
    for before, after in zip(expected, ours, strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-5, nan_ok=True)
    assert len(fleets) == 2, "the rank's death began the stage again, the sampler's did not"
    assert contents(killed) == contents(together)
    assert set(marked(mark)) <= {process.pid for process in group._processes}, "no sampler is left"


def test_restarts_are_counted_while_the_run_gets_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five failures with two restarts: after the first three there is a new checkpoint, after the next ones none."""
    loaded = load_recipe(recipe_file(tmp_path), ["machine={trainer: {gpus: 2}, restarts: {trainer: 2}}"]).recipe
    run, tries = Run(recipe=loaded, folder=tmp_path / "run"), iter(range(100))

    def fails(*_: Any, **__: Any) -> None:
        if (number := next(tries)) < 3:
            (run.checkpoints("sft") / f"step-0000000{number}").mkdir(parents=True)
        raise GroupFailure(1, "optim_step", 1.0, f"died {number}")

    monkeypatch.setattr(main, "run_pipeline", fails)
    world = RankedWorld(folder=run.folder, group=group_of(2), machine=loaded.machine)
    said: list[str] = []
    console = type("Quiet", (), {"say": staticmethod(said.append)})()
    with pytest.raises(GroupFailure, match="died 4"):
        main._run(run, world, console, lambda: False, UNDECIDED)
    assert [line.rpartition("(")[2] for line in said] == ["restart 1 of 2)"] * 3 + ["restart 2 of 2)"]


def test_ranks_die_with_their_driver() -> None:
    """A driver that is killed cannot end them."""
    code = (
        "import os, signal; from whet.config import MachineConfig; from whet.launch.ranks import Ranks, RankSetup\n"
        "how = {'store': ('', 0), 'device': 'cpu', 'threads': 1, 'products': 'mkl', 'frugal': False}\n"
        "setup = RankSetup(world=1, collective_s=60, **how)\n"
        "group = Ranks(MachineConfig(), setup); group.start(100); print(group._processes[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until = time.monotonic() + 30
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_rank_that_takes_no_message_is_named_in_time() -> None:
    """A stopped process keeps its connection, and a command that is larger than its buffers would wait for ever."""
    group = Ranks(machine_of(1, deadlines={"progress_s": 1.5}), replace(group_of(1).setup, world=1))
    group.start(PATIENCE_S)
    victim, began = group._processes[0].pid, time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(GroupFailure, match="takes no commands"):
        group.call("reseed", [(bytes(2**26),)], 1.5)
    assert time.monotonic() - began < 20 and not Path(f"/proc/{victim}").exists()


# ------------------------------------------------------------------------------------------------ strangers


KEY = bytes(range(32))


def answers(part: Any, connection: Any, key: bytes, found: list[str], *, driver: bool) -> None:
    try:
        part(connection, key, driver=driver)
        found.append("proved")
    except (AuthenticationError, EOFError, OSError) as error:
        found.append(type(error).__name__)


def test_driver_and_rank_prove_the_key_and_no_rank_proves_it_for_a_stranger() -> None:
    """A stranger in the driver's place has two ranks answer one another: none of them obeys it."""
    found: list[str] = []
    ours, theirs = Pipe()
    other = Thread(target=answers, args=(prove, theirs, KEY, found), kwargs={"driver": False})
    other.start()
    prove(ours, KEY, driver=True)
    other.join()
    assert found == ["proved"]
    for key in (KEY[::-1], b""):
        ours, theirs = Pipe()
        other = Thread(target=answers, args=(prove, theirs, key, found), kwargs={"driver": False})
        other.start()
        with pytest.raises(AuthenticationError):
            prove(ours, KEY, driver=True)
        ours.close()
        other.join()
    found.clear()
    (one, first), (two, second) = Pipe(), Pipe()
    ranks = [
        Thread(target=answers, args=(prove, end, KEY, found), kwargs={"driver": False}, daemon=True)
        for end in (first, second)
    ]
    for rank in ranks:
        rank.start()
    one.send_bytes(b"#CHALLENGE#" + bytes(20))  # whatever it answers is welcome
    one.recv_bytes()
    one.send_bytes(b"#WELCOME#")
    two.send_bytes(one.recv_bytes())  # what the first rank asks of its driver, the second is asked
    one.send_bytes(two.recv_bytes())
    ranks[0].join(10)
    two.close()
    ranks[1].join(10)
    assert "proved" not in found


def test_ranks_of_one_machine_cannot_be_reached_from_another() -> None:
    group = Ranks(machine_of(1), replace(group_of(1).setup, world=1))
    group.start(PATIENCE_S)
    try:
        assert listens(os.getpid()) | listens(group._processes[0].pid) == {"127.0.0.1"}
    finally:
        group.stop()


def listens(pid: int) -> set[str]:
    """The addresses at which a process listens."""
    nodes = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if os.path.lexists(f)}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in nodes:
                words = bytes.fromhex(local.split(":")[0])
                found.add(socket.inet_ntop(family, b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))))
    return found


def test_a_rank_waits_for_a_driver_that_a_launcher_has_not_started_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens, and where what listens says nothing and goes: it comes again."""
    free = socket.create_server(("127.0.0.1", 0))
    told = {"WHET_DRIVER": f"127.0.0.1:{free.getsockname()[1]}", "WHET_KEY": KEY.hex()}
    environment = {**os.environ, **told, "RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT / "src")}
    rank = subprocess.Popen([sys.executable, "-m", "whet.launch.rank"], env=environment, start_new_session=True)
    try:
        with free:
            free.settimeout(PATIENCE_S)
            free.accept()[0].close()
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(4 * AGAIN_S)
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        group = Ranks(machine_of(1), replace(group_of(1).setup, world=1))
        group.start(PATIENCE_S)
        group.stop()
        assert rank.wait(PATIENCE_S) == 0
    finally:
        rank.kill()


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("driver", "key", "expected"),
    [
        ("host", KEY.hex(), "WHET_DRIVER is 'host'; it must be host:port"),
        ("host:1", "", "WHET_KEY must be 64 hex digits"),
        ("host:1", "secret", "WHET_KEY must be 64 hex digits"),
    ],
)
def test_what_a_launcher_tells_is_checked(
    driver: str, key: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    several = recipe(tmp_path, "machine.trainer={nodes: 2, gpus: 2}")
    with pytest.raises(ConfigError, match="the driver starts ranks on its own machine alone; let a launcher"):
        ranked.require_ranks(several)
    monkeypatch.setenv("WHET_DRIVER", driver)
    monkeypatch.setenv("WHET_KEY", key)
    with pytest.raises(ConfigError, match=expected):
        ranked.require_ranks(several)


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("WHET_DRIVER", f"127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WHET_KEY", KEY.hex())
        with pytest.raises(RunError, match="choose another port in WHET_DRIVER"):
            group_of(1).start(1)


def test_a_command_that_a_rank_cannot_read_is_said_once() -> None:
    """By all ranks alike, so that they are not started again for it."""
    for command in (b"cwhet.launch.rank\nno_such_thing\n.", b"cno_such_module\nwork\n."):
        with pytest.raises(ConfigError, match="so the ranks cannot have it; define functions of your own in a module"):
            _read(command)


def recipe_file(folder: Path) -> Path:
    (folder / "r.yaml").write_text(RECIPE)
    return folder / "r.yaml"


def recipe(folder: Path, *words: str) -> Any:
    return load_recipe(recipe_file(folder), words).recipe


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["machine.trainer={gpus: 3, replicate: 2}"],
            "machine.trainer.replicate: 2 must divide the 3 ranks",
        ),
        (["machine.trainer={gpus: 3, context: 2}"], "machine.trainer.context: 2 must divide the 3 ranks"),
        (["machine.trainer.experts=2"], "machine.trainer.experts: 2, and there is no expert parallelism; set 1"),
        (["machine.trainer={gpus: 2, nodes: 0}"], "machine.trainer.nodes: must be at least 1"),
    ],
)
def test_a_cut_that_does_not_divide_is_refused(words: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as met:
        recipe(tmp_path, *words)
    assert expected in str(met.value)


def test_what_cannot_be_spread_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(*words: str) -> str:
        with pytest.raises((ConfigError, ModelError)) as met:
            ranked.build_world(recipe(tmp_path, "machine.trainer.gpus=2", *words), threads=1, frugal=False)
        return str(met.value)

    assert message("stages.sft.train.compile=true").startswith("stages.sft.train.compile: compiled layers")
    assert message("stages.rl.train.optimizer=adamw8bit").startswith("stages.rl.train.optimizer: bitsandbytes")
    assert message("stages.sft.train={steps: 1, lora: {}, quantize: nf4}").startswith(
        "stages.sft.train.quantize: four-bit"
    )
    monkeypatch.setattr(ranked, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert message() == "machine.trainer.gpus is 2, and this machine has 1; set at most that"


def test_an_objective_that_cannot_be_sent_is_said(groups: dict[int, Ranks]) -> None:
    together = build(groups[2])
    with pytest.raises(ConfigError, match="cannot be sent to other processes; define functions of your own at the top"):
        together.forward_backward(random_atoms(2, 1), replace(OBJECTIVES["grpo"], surrogate=lambda: None))
