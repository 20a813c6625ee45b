"""Norms and rotary embeddings of our own: transformers' bits forward, its gradients to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.laws.support import gradients, largest_difference, random_atoms
from whet.algorithms.sft import CrossEntropy
from whet.config import CreateConfig, ModelConfig, TrainConfig
from whet.models import layers, load
from whet.models.layers import _RMSNorm, _Rotary, simplify
from whet.training.engine import LocalTrainer

MODEL = ModelConfig(
    path="whet:tiny",
    device="cpu",
    create=CreateConfig(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=64, max_length=128),
)


def norm(kind: Any = Qwen3RMSNorm, size: int = 24) -> Any:
    """A norm whose weights are not 1."""
    module = kind(size, eps=1e-3)
    nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("shape", [(1, 8), (7, 8), (1, 5, 3, 8), (0, 8)])
def test_a_norm_s_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, (8,)))
    assert torch.autograd.gradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-3), (x, weight))
    across = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: _RMSNorm.apply(x.transpose(1, 2), weight, 1e-3), (across, weight))
    assert torch.autograd.gradcheck(lambda weight: _RMSNorm.apply(x.detach(), weight, 1e-3), (weight,))


def test_a_norm_is_transformers_norm() -> None:
    torch.manual_seed(0)
    module = norm()
    x, grad = (torch.randn(1, 33, 4, 24) for _ in range(2))
    found: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        out = module(given)
        found.append((out.detach(), *torch.autograd.grad(out, (given, module.weight), grad)))
        assert torch.equal(module(x), out)
        simplify(module)
    assert "RMSNorm" in type(module(x).grad_fn).__name__
    assert torch.equal(found[0][0], found[1][0])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_computed_by_transformers(dtype: torch.dtype) -> None:
    module, x = norm().to(dtype), torch.randn(5, 24).to(dtype)
    before = module(x)
    simplify(module)
    assert torch.equal(module(x), before) and "RMSNorm" not in type(module(x).grad_fn).__name__
    query, key, cos, sin = (
        torch.randn(1, 2, 3, 8).to(dtype),
        torch.randn(1, 1, 3, 8).to(dtype),
        *torch.randn(2, 1, 3, 8).to(dtype),
    )
    for left, right in zip(layers._rotate(theirs, query, key, cos, sin), theirs(query, key, cos, sin), strict=True):
        assert torch.equal(left, right)


def test_other_norms_stay_as_they_are() -> None:
    class OwnRMSNorm(LlamaRMSNorm):
        """Not transformers' own."""

    for module in (norm(GemmaRMSNorm), norm(OwnRMSNorm), nn.RMSNorm(8), nn.LayerNorm(8)):
        simplify(module)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_rotation_is_transformers_rotation(tokens: int) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(1, tokens, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(2, 1, tokens, 8)
    grads = (torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8))
    found = []
    for rotate in (theirs, lambda *given: layers._rotate(theirs, *given)):
        out = rotate(query, key, cos, sin)
        found.append((*out, *torch.autograd.grad(out, (query, key), grads)))
    assert "Rotary" in type(found[1][0].grad_fn).__name__
    for ours, exact in zip(found[1][:2], found[0][:2], strict=True):
        assert torch.equal(ours, exact)
    for ours, exact in zip(found[1][2:], found[0][2:], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    wide = [each.detach().double() for each in (query, cos, sin)]
    assert torch.autograd.gradcheck(lambda x: _Rotary.apply(x, *wide[1:]), (wide[0].requires_grad_(),))


def test_partial_and_unusual_rotations_are_transformers() -> None:
    query, key, (cos, sin) = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(2, 1, 3, 4)
    called: list[int] = []
    layers._rotate(lambda *given: (called.append(1), given[0], given[1])[1:], query, key, cos, sin)
    assert called
    changed = type("LlamaAttention", (LlamaAttention,), {"forward": lambda self, x: x, "__module__": "transformers.x"})
    assert layers._rotating(changed) is None
    assert layers._rotating(nn.Linear) is None
    assert layers._rotating(CohereAttention) is None, "it turns neighbours, not halves"
    assert layers._rotating(LlamaAttention) is not None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_same_gradients(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for simpler in (False, True):
        monkeypatch.setattr(load, "simplify", simplify if simpler else lambda module: None)
        model = load.load_model(MODEL, checkpointing=checkpointing)
        assert any("forward" in vars(part) for part in model.module.modules() if hasattr(part, "q_proj")) is simpler
        trainer = LocalTrainer(model, TrainConfig(lr=1e-2))
        loss = trainer.forward_backward(random_atoms(seed=0), CrossEntropy())["loss"]
        found.append((loss.total, gradients(trainer)))
    assert found[0][0] == found[1][0]
    assert largest_difference(found[0][1], found[1][1]) < 5e-6  # of gradients of up to 3
