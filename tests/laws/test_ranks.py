"""Law 1 across processes: two ranks that sum their gradients have the gradient of one, whoever got which atoms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from tests.laws.support import gradients, largest_difference, random_atoms, tiny_trainer
from whet.algorithms.policy_loss import PolicyLoss, policy_loss
from whet.config import PolicyConfig

PRESETS = ("grpo", "dapo", "gspo")


def objective(preset: str) -> PolicyLoss:
    policy = PolicyConfig.model_validate(preset)
    return policy_loss(policy, temperature=0.7, kl_coefficient=policy.kl.coefficient)


def rank(number: int, folder: str) -> None:
    """One of two processes: three atoms here, one there; gradients summed by gloo, never averaged."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)  # a file, since another process may take a free port meanwhile
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    trainer = tiny_trainer()
    for preset in PRESETS:
        atoms = random_atoms()
        trainer.forward_backward(atoms[:3] if number == 0 else atoms[3:], objective(preset))
        found = gradients(trainer)
        for name in sorted(found):
            dist.all_reduce(found[name])
        if number == 0:
            save_file(found, Path(folder) / f"{preset}.safetensors")
    dist.barrier()  # gloo aborts a process that leaves while the other still works
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_two_ranks_have_the_gradient_of_one(summed: Path, preset: str) -> None:
    alone = tiny_trainer()
    alone.forward_backward(random_atoms(), objective(preset))
    assert largest_difference(load_file(summed / f"{preset}.safetensors"), gradients(alone)) < 1e-12
