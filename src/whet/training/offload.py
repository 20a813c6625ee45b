"""CPU offload of what a GPU needs for a moment only: the optimizer's state, the frozen reference.

Offloaded tensors are pinned beside a GPU, so that each transfer is one copy without a stop in between. Nothing here
depends on the device: with a CPU on both sides the same copies are made and give the same numbers, which is how the
laws check it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where the tensor is on a GPU."""
    home = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return home.copy_(tensor.detach())


@contextmanager
def state_on_device(state: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
    """An optimizer's state beside its parameters inside the block; afterwards its new values are on the host again."""
    homes = {p: dict(kept) for p, kept in state.items()}
    for p, kept in state.items():
        kept.update({key: home.to(p.device, copy=True, non_blocking=True) for key, home in kept.items()})
    yield
    for p, kept in state.items():
        known = homes.get(p, {})  # the first step makes the state
        kept.update({key: known[key].copy_(now) if key in known else to_host(now) for key, now in kept.items()})


def offload(module: nn.Module) -> None:
    """Move a frozen model's parameters to the host; buffers are small and stay."""
    for p in module.parameters():
        p.data = to_host(p)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """An offloaded model on `device` inside the block. It is frozen, so nothing has to be copied back."""
    homes = [(p, p.data) for p in module.parameters()]
    for p, home in homes:
        p.data = home.to(device, copy=True, non_blocking=True)
    try:
        yield
    finally:
        for p, home in homes:
            p.data = home
