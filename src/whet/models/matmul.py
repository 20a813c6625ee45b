"""Products of matrices by the faster of the two libraries that torch brings along.

On a CPU torch multiplies float32 matrices with MKL, which on processors that are not Intel's stays with AVX2: half of
what AVX-512 can do. oneDNN is in the same binary and has no such scruples: on an AMD EPYC of the AVX-512 kind it is
2.2 times as fast (docs/benchmarks.md). Which one is faster is measured, once for a process, since no table of
processors would stay true. Where they are about as fast, oneDNN still wins a tenth of products by weights and loses
some gradients of weights: `mixed`. Their sums differ in the last bit, so a resumed run is told what it began with.

Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Library = Literal["mkl", "onednn", "mixed"]
"""mixed: gradients of weights by MKL, all other products by oneDNN."""

CLEARLY = 1.25
"""How many times faster oneDNN must be to be taken for every product."""
SLOWER = 1.15
"""How many times slower it must be to be taken for none."""
LEAST = 1_500_000
"""Products of fewer multiplications stay with MKL: a call of oneDNN costs some ten microseconds more."""
ROWS = 4
"""Either library gives a row of a product the same bits however many rows there are, in multiples of this.

Measured on torch 2.13 (MKL 2024.2, oneDNN 3.12) with 1 to 16 threads and 4 to 2,048 rows; held by
`tests/laws/test_products.py`. With one to three rows the kernels are others.
"""
USUAL_ROWS = 16
"""Rows that `rows_alike` reckons with when it chooses a library."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as `torch.nn.functional.linear` has it; x (..., I), weight (O, I). Differentiable."""
    if not _onednn_takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _multiply(x, weight, bias)


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`linear` by this weight as it is now, for rows (N, I) without gradients; the weights alone choose the library.

    On a CPU by a copy in the order in which the library reads: given any other it makes one for every product, which
    takes as long as reading the weights does. So oneDNN is the faster one here, whatever `library` says.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return partial(F.linear, weight=weight, bias=bias)
    if USUAL_ROWS * weight.numel() >= LEAST and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: multiply(x, packed, bias, "none", [], "")
    across = weight.t().contiguous()
    return partial(torch.mm, mat2=across) if bias is None else partial(torch.addmm, bias, mat2=across)


def padded(rows: Tensor) -> Tensor:
    """The rows (N, ...) with zeros behind them, up to a multiple of `ROWS`."""
    missing = -len(rows) % ROWS
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows


def adopt(module: nn.Module) -> None:
    """Let every plain linear layer inside multiply by `linear`, where that is faster here."""
    if library() != "mkl":
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def use_library(chosen: Library | None) -> Library:
    """Which library this process multiplies with: what a run began with, or (None) the faster one."""
    global _in_use  # noqa: PLW0603 - of the process, as torch's own number of threads is
    _in_use = chosen or _faster()
    return _in_use


def library() -> Library:
    """The library in use; the faster one from now on, where none was chosen."""
    return _in_use or use_library(None)


_in_use: Library | None = None
_thread = threading.local()


@contextmanager
def rows_alike() -> Iterator[None]:
    """Inside, in this thread, the weights alone choose the library: how many rows there are changes no row's bits."""
    before, _thread.alike = _alike(), True
    try:
        yield
    finally:
        _thread.alike = before


def _alike() -> bool:
    return not torch.compiler.is_compiling() and getattr(_thread, "alike", False)


@cache
def _faster() -> Library:
    """Measured in some thirty milliseconds, where it is first asked; far from 1 on both sides, so it stays the same."""
    if not torch.backends.mkldnn.is_available():
        return "mkl"
    x, weight = torch.ones(256, 256, device="cpu"), torch.ones(256, 256, device="cpu")
    onednn, mkl = _seconds((lambda: _multiply(x, weight), lambda: F.linear(x, weight)))
    if onednn * CLEARLY < mkl:
        return "onednn"
    return "mixed" if onednn < mkl * SLOWER else "mkl"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_NO, x_NI = grads[0].flatten(0, -2), x.flatten(0, -2)
        of_x = _multiply(grad_NO, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            whole = library() == "onednn"
            of_weight = _multiply(grad_NO.t(), x_NI.t()) if whole else torch.mm(grad_NO.t(), x_NI)
        return of_x, of_weight, grad_NO.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


def _onednn_takes(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and (USUAL_ROWS * weight.numel() if _alike() else x.numel() * weight.shape[0]) >= LEAST
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and library() != "mkl"
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():  # whose own idea of this operator takes constant weights only
        opaque: Tensor = _opaque(x, weight, bias)
        return opaque
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@torch.library.custom_op("whet::multiply", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as one operator that a compiler calls and does not look into."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _seconds(works: Sequence[Callable[[], object]], repeats: int = 50) -> list[float]:
    """The least CPU time of a call of each, in turns: others on the machine can only add to it, and hit both."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, spent in zip(works, times, strict=True):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
    return [min(spent) for spent in times]
