"""What a GPU needs for a moment only, at rest in the host's memory: the optimizer's state, the frozen reference.

Tensors at rest are pinned beside a GPU, so that each transfer is one copy without a stop in between. Nothing here asks
which device it is: with a CPU on both sides the same copies are made and the same numbers come of them, which is how
the laws check it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def at_rest(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where the tensor is on a GPU."""
    home = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return home.copy_(tensor.detach())


@contextmanager
def state_visiting(state: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
    """An optimizer's state beside its parameters inside the block; afterwards what became of it is at rest again."""
    homes = {p: dict(kept) for p, kept in state.items()}
    for p, kept in state.items():
        kept.update({key: home.to(p.device, copy=True, non_blocking=True) for key, home in kept.items()})
    yield
    for p, kept in state.items():
        known = homes.get(p, {})  # the first step makes the state
        kept.update({key: known[key].copy_(now) if key in known else at_rest(now) for key, now in kept.items()})


def lay_down(module: nn.Module) -> None:
    """Put a frozen model's parameters at rest; buffers are small and stay."""
    for p in module.parameters():
        p.data = at_rest(p)


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A model at rest on `device` inside the block. It is frozen, so nothing has to be brought back."""
    homes = [(p, p.data) for p in module.parameters()]
    for p, home in homes:
        p.data = home.to(device, copy=True, non_blocking=True)
    try:
        yield
    finally:
        for p, home in homes:
            p.data = home
