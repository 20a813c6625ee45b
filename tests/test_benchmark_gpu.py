"""The GPU benchmark runs to its end on a CPU, and says so where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NO_GPU = 3


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (NO_GPU, "")
    assert "no GPU" in done.stderr


def test_every_law_and_measurement_runs() -> None:
    done = run("--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    laws, lines = ([line for line in lines if ("passed" in line) == law] for law in (True, False))
    words = ["attention", "decoding", "gradient", "gradient", "hand-over to vLLM", "a GRPO step"]
    assert [law["name"].startswith(word) for law, word in zip(laws, words, strict=True)] == [True] * 6
    assert all(law["passed"] and law["found"] <= law["at_most"] for law in laws[:4])
    assert all(law["passed"] is not False or "vllm" in law["name"].lower() for law in laws)
    names = [line["name"].partition(",")[0] for line in lines]
    assert names == ["matrix product", "copy", *["attention"] * 2, "SFT", *["GRPO"] * 2, *["decoding"] * 2]
    assert all(line["seconds"] > 0 and line["rate"] > 0 for line in lines)
    assert all(line["share"] > 0 for line in lines[2:])
    assert all(line["name"] in done.stderr for line in (*laws, *lines))
