"""A product is the same by either library, forward and backward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from whet.cli.app import main
from whet.formulas import logprobs
from whet.models import matmul

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 33), (2, 1, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("library", ["onednn", "mixed"])
def test_onednn_s_products_are_torch_s(
    shape: tuple[int, ...], with_bias: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_in_use", library)
    monkeypatch.setattr(matmul, "LEAST", 0)
    torch.manual_seed(0)
    x, weight, grad = torch.randn(*shape, 40), torch.randn(24, 40), torch.randn(*shape, 24)
    bias = torch.randn(24) if with_bias else None
    taken = (x, weight, bias) if with_bias else (x, weight)
    found = []
    for function, dtype in ((matmul.linear, torch.float32), (F.linear, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in taken]
        out = function(*inputs)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))))
        with torch.no_grad():
            torch.testing.assert_close(function(*inputs), out.detach(), rtol=0, atol=0)
    assert "_Linear" in type(matmul.linear(x.requires_grad_(), weight).grad_fn).__name__
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5)


@needs_onednn
@pytest.mark.parametrize(("library", "products"), [("onednn", 3), ("mixed", 2), ("mkl", 0)])
def test_each_product_goes_through_its_library(library: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_in_use", library)
    monkeypatch.setattr(matmul, "LEAST", 0)
    calls: list[int] = []
    multiply = matmul._multiply
    monkeypatch.setattr(matmul, "_multiply", lambda *given: (calls.append(1), multiply(*given))[1])
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    matmul.linear(x, weight).sum().backward()
    assert len(calls) == products, "of the output, of x, of the weights"


@needs_onednn
@pytest.mark.parametrize("wide", [0, 1000])
def test_a_head_says_the_same_by_either_library(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_in_use", "onednn")
    monkeypatch.setattr(matmul, "LEAST", 0)
    monkeypatch.setattr(logprobs, "WIDE", wide)
    calls: list[int] = []
    multiply = matmul._multiply
    monkeypatch.setattr(matmul, "_multiply", lambda *given: (calls.append(1), multiply(*given))[1])
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(20, 16), torch.randn(48, 16), torch.randint(0, 48, (20,))
    found = []
    for product, dtype in ((matmul.linear, torch.float32), (F.linear, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        head = logprobs.Linear(inputs[1], None, product)
        logp_T, _ = logprobs.chunked_logp(inputs[0], target, head, vocabulary=48, chunk_elements=48 * 8)
        found.append((logp_T.detach(), *torch.autograd.grad(logp_T.sum(), inputs)))
    assert len(calls) == (9 if wide == 0 else 3)  # three chunks: logits twice, and the gradient of the hidden states
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (512, 256), (768, 128), (200, 640)])
def test_a_copied_weight_gives_a_row_the_same_bits_among_any_others(shape: tuple[int, int], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2048, shape[1]), torch.randn(shape), torch.randn(shape[0]) if with_bias else None
    multiply = matmul.product(weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    weight.zero_()  # what was copied stays
    whole = multiply(x)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-4)
    for rows in (4, 8, 12, 20, 64, 132, 1000):
        assert torch.equal(multiply(x[:rows]), whole[:rows])
        assert torch.equal(multiply(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_where_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_in_use", "onednn")
    monkeypatch.setattr(matmul, "LEAST", 0)
    x, weight = torch.randn(8, 16).to(dtype), torch.randn(4, 16).to(dtype)
    assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_small_products_and_slower_libraries_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(matmul, "_multiply", lambda *_: called.append(1))
    x, weight = torch.randn(64, 256), torch.randn(256, 256)
    monkeypatch.setattr(matmul, "_in_use", "onednn")
    matmul.linear(x, weight)
    assert len(called) == 1
    matmul.linear(x[:2], weight)
    monkeypatch.setattr(matmul, "_in_use", "mkl")
    matmul.linear(x, weight)
    assert len(called) == 1


@needs_onednn
def test_an_adopted_model_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "LEAST", 0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4, bias=False))
    x = torch.randn(9, 16)
    found = []
    for chosen in ("mkl", "onednn", "mixed"):
        monkeypatch.setattr(matmul, "_in_use", chosen)
        matmul.adopt(model)
        out = model(x)
        assert ("_Linear" in type(out.grad_fn).__name__) is (chosen != "mkl")
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    for left, right, mixed in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(left, mixed, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight"]


@pytest.mark.parametrize(
    ("onednn", "mkl", "chosen"), [(1, 1.3, "onednn"), (1, 1.08, "mixed"), (1.1, 1, "mixed"), (1.2, 1, "mkl")]
)
def test_the_library_is_chosen_by_its_time(
    onednn: float, mkl: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "_seconds", lambda works: [onednn, mkl])
    assert matmul._faster.__wrapped__() == chosen


@pytest.mark.parametrize(("first", "then"), [("mkl", "onednn"), ("onednn", "mkl"), ("mixed", "mkl")])
def test_a_run_goes_on_with_the_library_that_it_began_with(
    first: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matmul, "_in_use", None)
    stage = {"kind": "sft", "data": {"generate": "arithmetic", "count": 4}, "train": {"steps": 1, "batch_size": 2}}
    Path("run.yaml").write_text(
        json.dumps({"name": "run", "threads": 1, "model": "whet:tiny", "stages": {"sft": stage}})
    )
    for faster in (first, then):
        monkeypatch.setattr(matmul, "_faster", lambda faster=faster: faster)
        with pytest.raises(SystemExit, match="0"):
            main(["run", "run.yaml", "--json"])
        assert matmul.library() == first
    assert json.loads(Path("runs/run/run.json").read_text())["products"] == first
