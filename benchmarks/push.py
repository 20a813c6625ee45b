"""What a hand-over of weights and a resumed group cost: `python -m benchmarks.push --model FOLDER [--ranks 1 2 3]`.

A JSON line for the hand-over to one sampler process (seconds until its digest and its probe are confirmed; memory that
the driver and the sampler need above what they had before, at most), and one for each number of trainer ranks: seconds
until they have started and loaded the model, for saving a checkpoint and for reading it again. `memcpy_s` is a copy of
as many bytes in memory, and `hash_s` one SHA-256 over them, in the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from whet.config import MachineConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.lag import LagConfig
from whet.config.loading import load_recipe
from whet.launch.ranked import build_world
from whet.launch.world import LocalWorld
from whet.sampling.process import ReplicaState


def timed(work: Callable[[], Any]) -> float:
    """Seconds of wall time."""
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 3)


def peak_mb(pid: int | str) -> float:
    """The most memory that a process has had since `forget`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget(pid: int | str) -> float:
    """Begin to look for the peak anew; returns what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_mb(pid)


def push(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """The hand-over to a process, three times after the first."""
    world = LocalWorld(folder=folder, machine=MachineConfig.model_validate({"samplers": {"replicas": 1}}))
    policy = world.policy(model, TrainConfig(), SamplingConfig(), lag=LagConfig())
    fleet: Any = policy.apart
    policy.hand_over(0)
    while fleet.replicas[0].health is not ReplicaState.HEALTHY:
        time.sleep(0.1)
    processes = ["self", fleet.replicas[0].pid]
    before = [forget(pid) for pid in processes]
    seconds = [timed(lambda version=version: policy.hand_over(version)) for version in (1, 2, 3)]  # type: ignore[misc]
    extra = [peak_mb(pid) - had for pid, had in zip(processes, before, strict=True)]
    weights = list(fleet.model.parameters.values())
    size = sum(p.nbytes for p in weights)
    flat = torch.cat([p.detach().view(-1).view(torch.uint8) for p in weights])
    fleet.close()
    return {
        "weights_mb": round(size / 2**20),
        "push_s": sorted(seconds),
        "memcpy_s": timed(flat.clone),
        "hash_s": timed(lambda: hashlib.sha256(flat.numpy().data).digest()),
        "driver_extra_mb": round(extra[0]),
        "sampler_extra_mb": round(extra[1]),
    }


def resume(model: ModelConfig, folder: Path, ranks: int) -> dict[str, Any]:
    """A group that starts, saves and loads; a world of one rank is this process."""
    stage = {"kind": "sft", "data": {"generate": "arithmetic"}}
    given = {"name": "push", "model": model.path, "machine": {"trainer": {"gpus": ranks}}, "stages": {"sft": stage}}
    recipe = load_recipe({**given, "out": str(folder)}).recipe
    world = build_world(recipe, threads=1, frugal=False)
    began = time.perf_counter()
    trainer = world.policy(model, TrainConfig(), SamplingConfig()).trainer
    start_s = round(time.perf_counter() - began, 2)
    trainer.optim_step(0.0)
    saved = folder / "saved"
    saved.mkdir(parents=True)
    found = {"save_s": timed(lambda: trainer.save(saved)), "load_s": timed(lambda: trainer.load(saved))}
    world.close()
    return {"ranks": ranks, "start_s": start_s, **found}


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description="time hand-overs and resumed groups")
    parser.add_argument("--model", default="whet:demo")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = ModelConfig(path=asked.model, device="cpu")
    for work in (push, *((lambda m, f, n=n: resume(m, f, n)) for n in asked.ranks)):
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(json.dumps(work(model, Path(folder) / "run")) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
