"""One vLLM engine for the tests of a file: it takes seconds to start, and a process has one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from whet.config import ModelConfig, TrainConfig
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.records import Completion, TokenRow
from whet.sampling.base import Request
from whet.sampling.vllm import VllmSampler
from whet.training.engine import LocalTrainer

CACHE_GIB = 0.25


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


def largest_gap(
    model: LanguageModel, asked: Sequence[Request], answers: Sequence[Completion], *, temperature: float = 1.0
) -> float:
    """Largest difference between what the sampler and what the trainer say of the sampled tokens."""
    rows = [
        TokenRow(tokens=r.prompt + a.tokens, trained=(False,) * len(r.prompt) + (True,) * len(a.tokens))
        for r, a in zip(asked, answers, strict=True)
    ]
    trained = LocalTrainer(model, TrainConfig()).logprobs(rows, temperature=temperature)
    pairs = [(a.logprobs, logps) for a, logps in zip(answers, trained, strict=True)]
    return max(abs(ours - theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True))
