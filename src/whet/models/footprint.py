"""How much memory a training step takes, found by running it on tensors that have a shape and no content.

The model is built from its configuration alone, in torch's fake mode, and one micro-batch goes through the real
forward pass, backward pass and optimizer. What is alive at each moment is counted, so whatever the code keeps is in
the figure, and no formula has to follow the code. Takes about a second, for a model of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whet.config import LoraConfig, ModelConfig
from whet.models.device import pick_compute, pick_device
from whet.models.language import LanguageModel
from whet.models.load import load_skeleton


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage from its birth to its death."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@contextmanager
def rehearsal(
    config: ModelConfig, *, lora: LoraConfig | None = None, checkpointing: bool = False, scalar: bool = False
) -> Iterator[tuple[LanguageModel, Ledger]]:
    """A model without content (`scalar`: with one number instead of a vocabulary), and the ledger of what happens to
    it inside this block."""
    # On a CPU whatever the device: shapes and precision are the same, and a GPU need not be there.
    compute = str(pick_compute(config.dtype, pick_device(config.device))).removeprefix("torch.")
    there = config.model_copy(update={"device": "cpu", "dtype": compute})
    model = load_skeleton(there, lora=lora, checkpointing=checkpointing, scalar=scalar)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        _place(model.module, model.device)
        yield model, ledger


def _place(module: nn.Module, device: torch.device) -> None:
    """Put every parameter and buffer where it would be; tied ones stay tied."""
    placed: dict[int, Tensor] = {}
    for child in module.modules():
        stores: list[dict[str, Any]] = [child._parameters, child._buffers]
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in placed:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    placed[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    store[name] = placed[id(tensor)]
