"""One vLLM engine for the tests of a file: it takes seconds to start, and a process has one at a time.

A server is a process of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch

from tests.laws.support import logps_of
from whet.config import ModelConfig, TrainConfig
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.records import Completion, TokenRow
from whet.sampling.base import Request
from whet.sampling.vllm import VllmSampler
from whet.training.engine import LocalTrainer

CACHE_GIB = 0.25
START_S = 300
FLAGS = "--dtype float32 --enforce-eager --kv-cache-memory-bytes 100000000"


@pytest.fixture(scope="session")
def vllm() -> ModuleType:
    """Skips where vLLM is not installed."""
    return pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs this")


@pytest.fixture(scope="module")
def engine(vllm: ModuleType) -> VllmSampler:
    return VllmSampler(load_model(ModelConfig(path="whet:demo")), max_running=128, cache_gib=CACHE_GIB)


@pytest.fixture(scope="module")
def beginning(engine: VllmSampler) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.parameters.items()}


@pytest.fixture
def sampler(engine: VllmSampler, beginning: dict[str, torch.Tensor]) -> VllmSampler:
    """The engine with the weights that it started with, as version 0."""
    with torch.no_grad():
        for name, p in engine.model.parameters.items():
            p.copy_(beginning[name])
    engine.publish(0)
    return engine


def disturb(model: LanguageModel, size: float = 0.02) -> None:
    """Change every weight that is trained, as a training step would, but more."""
    with torch.no_grad():
        for p in model.parameters.values():
            p.add_(torch.randn_like(p) * size)


def logps_in(
    model: LanguageModel, asked: Sequence[Request], answers: Sequence[Completion], *, temperature: float = 1.0
) -> list[np.ndarray]:
    """What the trainer says of the sampled tokens."""
    rows = [
        TokenRow(
            tokens=np.concatenate([np.asarray(r.prompt, np.int32), a.tokens]),
            trained=np.arange(len(r.prompt) + len(a.tokens)) >= len(r.prompt),
        )
        for r, a in zip(asked, answers, strict=True)
    ]
    return logps_of(LocalTrainer(model, TrainConfig()), rows, temperature=temperature)


def largest_gap(
    model: LanguageModel, asked: Sequence[Request], answers: Sequence[Completion], *, temperature: float = 1.0
) -> float:
    """Largest difference between what the sampler and what the trainer say of the sampled tokens."""
    pairs = zip(answers, logps_in(model, asked, answers, temperature=temperature), strict=True)
    return max(float(abs(a.logprobs - logps).max()) for a, logps in pairs)


@contextmanager
def serving(folder: Path, flags: str = "", **settings: str) -> Iterator[str]:
    """The address of a vLLM server of the model in `folder`; `settings` are environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` is this module; its own command asks for a package of the name vllm, and the CPU build has another.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    known = os.environ | {"VLLM_NO_USAGE_STATS": "1"} | settings
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *FLAGS.split(), *flags.split(), *address], env=known, stdout=out, stderr=out
        )
    try:
        _await(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2 * START_S):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
