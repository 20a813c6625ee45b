"""A GRPO step of whet beside one of TRL, on the same model, prompts and answers: seconds of a step, ours by theirs.

Both sample as many answers of as many tokens to the same prompts, reward them alike and update once; TRL with vLLM in
its process where that is installed, whet with its own engine. Sampling, rewards and update are in both figures.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

PROMPTS, ANSWERS, TOKENS, STEPS = 8, 8, 64, 6
TASKS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10, 50) for b in (7, 19)]


def mean_id(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs between answers."""
    return [sum(ids) / max(1, len(ids)) for ids in completion_ids]


def beside_trl(folder: Path, device: torch.device) -> float:
    """The median step of whet by that of TRL; the first of each warms up."""
    with redirect_stdout(sys.stderr):  # TRL prints
        return statistics.median(ours(folder, device)[1:]) / statistics.median(theirs(folder, device)[1:])


def ours(folder: Path, device: torch.device) -> list[float]:
    """Seconds of each step, from a run's own log."""
    import whet

    with tempfile.TemporaryDirectory(prefix="whet-step-") as out:
        run = whet.train(
            "grpo", {"path": str(folder), "device": device.type}, out=Path(out) / "run", quiet=True, tasks=TASKS,
            rewards=[mean_id], prompts_per_step=PROMPTS, rollouts_per_prompt=ANSWERS,
            sampling={"max_tokens": TOKENS}, train={"steps": STEPS, "lr": 1e-6},
        )  # fmt: skip
        ends = run.metrics()["time_s"].tolist()
    return [after - before for before, after in pairwise(ends)]


def theirs(folder: Path, device: torch.device) -> list[float]:
    """Seconds of each step of TRL's trainer."""
    import transformers
    import trl
    from datasets import Dataset

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.time())

    fast = device.type == "cuda"
    vllm = {"use_vllm": True, "vllm_mode": "colocate"} if fast and importlib.util.find_spec("vllm") else {}
    with tempfile.TemporaryDirectory(prefix="whet-trl-") as out:
        trl.GRPOTrainer(
            model=str(folder),
            reward_funcs=mean_id,
            args=trl.GRPOConfig(
                output_dir=out, max_steps=STEPS, learning_rate=1e-6, num_generations=ANSWERS, beta=0.0,
                max_completion_length=TOKENS, per_device_train_batch_size=PROMPTS * ANSWERS, bf16=fast,
                use_cpu=not fast, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                **vllm,
            ),
            train_dataset=Dataset.from_list(TASKS),
            callbacks=[Clock()],
        ).train()  # fmt: skip
    return [after - before for before, after in pairwise(ends)]
