"""Segments in any cut of a stream: attention is the dense mask's, and every token is in one part."""

from __future__ import annotations

import pytest
import torch

from whet.models import segments
from whet.models.attention import AttentionCall, Tree, TreeLayout
from whet.models.segments import Bucket, Stretch

TREES = (Tree(70, (64, 64, 80, 3)), Tree(0, (100, 65)), Tree(5, (64,) * 5), Tree(90, ()), Tree(0, (2, 3)))


@pytest.mark.parametrize("alone", [1, 64, 1000])
def test_attention_of_any_parts_is_that_of_a_dense_mask(alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ALONE", alone)
    monkeypatch.setattr(segments, "FEW_THREADS", torch.get_num_threads())
    found = []
    for backend in ("flash", "masked"):
        layout, draw = TreeLayout(TREES, torch.device("cpu"), backend), torch.Generator().manual_seed(0)
        shapes = ((1, heads, layout.tokens, 16) for heads in (4, 2, 2))
        inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
        out = layout.attend(inputs[0], inputs[1], inputs[2], AttentionCall(layer=0, scale=0.25, window=None))
        upstream = torch.arange(out.numel(), dtype=torch.float64).view_as(out).sin()
        found.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_long_neighbours_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "FEW_THREADS", torch.get_num_threads())
    parts = TreeLayout(TREES, torch.device("cpu")).parts
    stretches = [part for part in parts if isinstance(part, Stretch)]
    shapes = [(each.S, each.L) for each in stretches]
    assert shapes == [(1, 70), (2, 64), (1, 80), (1, 100), (1, 65), (5, 64), (1, 90)]
    numbers = torch.arange(TreeLayout(TREES, torch.device("cpu")).tokens).double()[:, None]
    taken, written = stretches[1].take(numbers), torch.zeros_like(numbers)
    assert taken.data_ptr() == numbers[70:].data_ptr()
    for part in parts:
        part.put(written, part.take(numbers))
    assert torch.equal(written, numbers)
    monkeypatch.setattr(segments, "FEW_THREADS", 0)
    assert all(isinstance(part, Bucket) for part in TreeLayout(TREES, torch.device("cpu")).parts)
