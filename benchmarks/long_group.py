"""The memory of one step of a large group of long answers, which is cut to the budget between answers.

    python -m benchmarks.long_group --model FOLDER [--answers 16] [--tokens 4000]

Prints the peak of the process (VmHWM) after one step of AdamW; `benchmarks.make_model` writes the folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from whet.algorithms.policy_loss import policy_loss
from whet.config import ModelConfig, PolicyConfig, TrainConfig
from whet.models.load import load_model
from whet.records import Atom, TokenRow
from whet.training.engine import LocalTrainer, microbatches

PROMPT = 100


def main() -> None:
    """One step, then a JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    trainer = LocalTrainer(load_model(ModelConfig(path=asked.model)), TrainConfig())
    draw = np.random.default_rng(0)
    length, vocabulary = PROMPT + asked.tokens, trainer.model.vocabulary
    prompt = draw.integers(0, vocabulary, PROMPT)
    rows = [
        TokenRow(
            tokens=np.concatenate([prompt, draw.integers(0, vocabulary, asked.tokens)]),
            trained=np.arange(length) >= PROMPT,
            shared=PROMPT,
        ).with_columns(weight=1 / asked.tokens, advantage=draw.standard_normal(), sampler_logp=-5.0)
        for _ in range(asked.answers)
    ]
    group = Atom(rows=tuple(rows))
    cuts = len(list(microbatches([group], trainer.budget, together=False)))
    began = time.process_time()
    trainer.forward_backward([group], policy_loss(PolicyConfig()))
    trainer.optim_step(1.0)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    found = {
        "answers": asked.answers,
        "tokens_each": asked.tokens,
        "micro_batches": cuts,
        "cpu_s": round(time.process_time() - began, 1),
        "peak_gib": round(int(peak[1]) / 2**20, 2),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
