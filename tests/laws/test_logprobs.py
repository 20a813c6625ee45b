"""Log-probabilities: reference numbers, and one answer whatever the head, the chunks and the precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.laws.support import tiny_model
from whet.config import LoraConfig
from whet.formulas.logprobs import Linear, chunked_logp, entropy, token_logp

HEADS: dict[str, Callable[[Tensor, Tensor], Linear | Callable[[Tensor], Tensor]]] = {
    "linear": Linear,
    "callable": lambda weight, bias: lambda hidden: hidden @ weight.T + bias,
}


def test_logprobs_by_hand() -> None:
    logits, target = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([1])
    scaled = [math.exp(x / 0.5) for x in (1, 2, 3)]
    assert token_logp(logits, target, temperature=0.5).item() == pytest.approx(math.log(scaled[1] / sum(scaled)))
    p = [x / sum(scaled) for x in scaled]
    assert entropy(logits, temperature=0.5).item() == pytest.approx(-sum(q * math.log(q) for q in p))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_neither_head_nor_chunks_change_anything(entropy_gradient: bool, temperature: float) -> None:
    hidden, weight, bias, target = _case()
    results = []
    for make in HEADS.values():
        for elements in (11, 40, 10_000):
            logp, measured = chunked_logp(
                hidden, target, make(weight, bias), vocabulary=11, temperature=temperature, with_entropy=True,
                entropy_gradient=entropy_gradient, chunk_elements=elements,
            )  # fmt: skip
            assert measured is not None and measured.requires_grad == entropy_gradient
            loss = (logp * torch.arange(13)).sum() + (measured.square().sum() if entropy_gradient else 0)
            results.append((logp.detach(), measured.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, atol=1e-13, rtol=0)


@pytest.mark.parametrize("elements", [11, 10_000])
def test_the_linear_heads_gradient_is_that_of_finite_differences(elements: int) -> None:
    hidden, weight, bias, target = _case()

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        return chunked_logp(
            hidden, target, Linear(weight, bias), vocabulary=11, temperature=0.7, with_entropy=True,
            entropy_gradient=True, chunk_elements=elements,
        )  # fmt: skip

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient_and_gives_the_states_theirs() -> None:
    hidden, weight, _, target = _case()
    expected = torch.autograd.grad(token_logp(hidden @ weight.T, target).sum(), hidden)
    logp, measured = chunked_logp(hidden, target, Linear(weight.detach(), None), vocabulary=11)
    assert measured is None
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), hidden), expected, atol=1e-13, rtol=0)


def test_under_autocast_both_heads_round_the_products_and_nothing_else() -> None:
    hidden, weight, bias, target = (t.float() if t.is_floating_point() else t for t in _case())
    hidden, weight, bias = (t.detach().requires_grad_() for t in (hidden, weight, bias))
    results = []
    for head in (Linear(weight, bias), lambda h: torch.nn.functional.linear(h, weight, bias)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logp, measured = chunked_logp(hidden, target, head, vocabulary=11, with_entropy=True)
        assert logp.dtype == torch.float32 and measured is not None and measured.dtype == torch.float32
        results.append((logp.detach(), measured, *torch.autograd.grad(logp.sum(), (hidden, weight, bias))))
    exact = token_logp(hidden @ weight.T + bias, target).detach()
    assert 1e-4 < (results[0][0] - exact).abs().max() < 0.1
    for left, right in zip(*results, strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right, atol=0.05, rtol=0.02)


def test_no_trained_token_is_no_gradient() -> None:
    hidden, weight, bias, target = _case()
    logp, _ = chunked_logp(hidden[:0], target[:0], Linear(weight, bias), vocabulary=11, with_entropy=True)
    assert logp.shape == (0,)
    assert not torch.autograd.grad(logp.sum(), weight)[0].any()


def test_a_head_with_an_adapter_goes_the_general_way() -> None:
    model = tiny_model(lora=LoraConfig(rank=2, targets=["lm_head"]))
    states = torch.randn(5, 32, dtype=torch.float64)
    target, down, up = torch.arange(5), *(p for name, p in model.parameters.items() if "lora_" in name)
    torch.nn.init.normal_(up)
    logp, _ = model.logp_at(states, target, temperature=1.0)
    torch.testing.assert_close(logp, token_logp(model.logits(states), target))
    assert all(grad.any() for grad in torch.autograd.grad(logp.sum(), (down, up)))


def test_the_entropys_gradient_by_hand() -> None:
    """-p (log p + H) for each logit."""
    logits = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    _, measured = chunked_logp(
        torch.ones(1, 5, dtype=torch.float64), torch.tensor([0]), lambda h: (h * logits.T),
        vocabulary=5, with_entropy=True, entropy_gradient=True,
    )  # fmt: skip
    measured.sum().backward()
    logp = logits.detach().squeeze(-1).log_softmax(-1)
    torch.testing.assert_close(logits.grad.squeeze(-1), -logp.exp() * (logp + measured.item()))


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights and bias of a head, and targets: 13 tokens, 11 in the vocabulary, in float64."""
    torch.manual_seed(0)
    sizes = ((13, 6), (11, 6), (11,))
    hidden, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return hidden, weight, bias, torch.randint(11, (13,))
