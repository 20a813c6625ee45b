"""What a long row costs on ranks that share it: `python -m benchmarks.context [--tokens 4096] [--steps 3]`.

A JSON line for one process, and one for two ranks that compute each row together (`machine.trainer.context: 2`), one
thread each: wall seconds of a step (gradient of one row, and the update), tokens a CPU second over all processes that
train, and for each of them the memory before the steps and by how much its peak was above that. The model is a decoder
of random weights (`--hidden`, `--layers`); the loss at the end must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.push import forget, peak_mb
from whet.algorithms.sft import CrossEntropy, weigh
from whet.config import CreateConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.loading import load_recipe
from whet.launch.ranked import build_world
from whet.records import TokenRow

TICKS = os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """Processes that this one has started and that live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid():
                found.append(int(folder.name))
    return sorted(found)


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that these processes have taken."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS


def measure(model: ModelConfig, row: TokenRow, steps: int, context: int) -> dict[str, Any]:
    """Steps on one row, by this process or by `context` ranks; the first one is not counted."""
    train = TrainConfig(microbatch_tokens=len(row.tokens), lr=1e-3, gradient_checkpointing=False)
    stage = {"kind": "sft", "data": {"generate": "arithmetic"}}
    with tempfile.TemporaryDirectory() as folder:
        machine = {"trainer": {"gpus": context, "context": context}}
        given = {"name": "context", "model": "whet:tiny", "machine": machine, "stages": {"sft": stage}}
        world = build_world(load_recipe({**given, "out": folder}).recipe, threads=context, frugal=False)
        trainer = world.policy(model, train, SamplingConfig()).trainer
        pids = children() if context > 1 else [os.getpid()]

        def step() -> float:
            metrics = trainer.forward_backward(weigh([row]), CrossEntropy())
            trainer.optim_step(1.0)
            return metrics["loss"].mean

        loss = step()
        held = [forget(pid) for pid in pids]
        cpu, began = cpu_s(pids), time.perf_counter()
        for _ in range(steps):
            loss = step()
        wall, cpu = time.perf_counter() - began, cpu_s(pids) - cpu
        above = [peak_mb(pid) - had for pid, had in zip(pids, held, strict=True)]
        world.close()
    return {
        "ranks": context, "tokens": len(row.tokens), "step_s": round(wall / steps, 2),
        "tokens_per_cpu_s": round(steps * len(row.tokens) / cpu), "held_mb": [round(each) for each in held],
        "peak_above_mb": [round(each) for each in above], "loss": loss, "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description="time a long row on one process and on ranks that share it")
    for name, default in (("tokens", 4096), ("steps", 3), ("hidden", 512), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    shape = CreateConfig(
        hidden_size=asked.hidden, layers=asked.layers, heads=8, kv_heads=4, intermediate_size=3 * asked.hidden,
        max_length=asked.tokens,
    )  # fmt: skip
    model = ModelConfig(path="whet:tiny", create=shape, device="cpu")
    tokens = np.random.default_rng(0).integers(0, 250, asked.tokens).astype(np.int32)
    row = TokenRow(tokens=tokens, trained=np.arange(asked.tokens) > 0)
    for context in (1, 2):
        sys.stdout.write(json.dumps(measure(model, row, asked.steps, context)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
