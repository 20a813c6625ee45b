"""Optimizers and schedules. State is a flat dictionary of tensors, so that a checkpoint is one safetensors file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from whet.config import TrainConfig
from whet.errors import RunError
from whet.models.quantize import bitsandbytes
from whet.training.offload import state_on_device, to_host

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan 2024)."""
NOT_LAYERS = ("embed", "head", "score")
"""Parts of the names of matrices that are no layer's: embeddings, the output head and the scalar head."""
PART_NUMBERS = 2**26
"""Parameters whose state is moved to the device together, where it rests on the host: half a GiB of AdamW's."""


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix by Newton-Schulz (Jordan 2024), for 2-D weights.

    Weight decay is decoupled as in AdamW: p <- p (1 - lr weight_decay) before the update (Liu 2502.16982, eq. 3).
    Iterates in float32: `torch.optim.Muon` uses bfloat16, which a CPU without the units computes very slowly.
    """

    def __init__(
        self,
        params: list[dict[str, Any]] | list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(state["momentum"], group["momentum"])
                update = sharded_like(orthogonalise(whole(nesterov), steps=group["steps"]), p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def orthogonalise(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Roughly U V^T of the singular value decomposition of `matrix`: singular values between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    near: Tensor = x.T if tall else x
    return near


def whole(tensor: Tensor) -> Tensor:
    """The tensor; one that ranks share is gathered on each of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that is whole on every rank, as shards where the other is; nothing is sent."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # seconds: only where there are ranks

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]


class Optimizers:
    """AdamW over everything, or Muon over the layers' matrices and AdamW over the rest; one step, one state.

    Every parameter's update is its own, so where the state rests on the host (`train.offload`) the parameters are
    stepped in parts, each by an optimizer of its own, and only one part's state is on the device at a time.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.parameters, self.config = dict(parameters), config
        self.away = "optimizer" in config.offload
        matrices = {
            name for name, p in self.parameters.items() if p.ndim == 2 and not any(part in name for part in NOT_LAYERS)
        }
        by_muon = matrices if config.optimizer == "muon" else set()
        decayed = [p for name, p in self.parameters.items() if name in matrices - by_muon]
        plain = [p for name, p in self.parameters.items() if name not in matrices]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        muon = [{"params": [self.parameters[name] for name in sorted(by_muon)], "weight_decay": config.weight_decay}]
        self.adamw = [_adamw(part, config) for part in self._parts(groups)]
        self.muon = [Muon(part, lr=config.muon_lr) for part in self._parts(muon)]

    def step(self, lr_factor: float) -> None:
        """Apply the gradients at this share of the peak rates and clear them."""
        for optimizers, peak in ((self.adamw, self.config.lr), (self.muon, self.config.muon_lr)):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * lr_factor
                with state_on_device(optimizer.state) if self.away else nullcontext():
                    optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimizers' state, named `PARAMETER:KEY`."""
        tensors = {}
        for name, p in self.parameters.items():
            for optimizer in (*self.adamw, *self.muon):
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"{name}:{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`; a tensor for an unknown parameter is an error."""
        owner = {id(p): o for o in (*self.adamw, *self.muon) for g in o.param_groups for p in g["params"]}
        for optimizer in {id(o): o for o in owner.values()}.values():
            optimizer.state.clear()  # a run that goes back to its beginning has no moments either
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(":")
            if name not in self.parameters:
                raise RunError(f"the checkpoint's optimizer knows a parameter {name!r} that this model does not have")
            p = self.parameters[name]
            # torch keeps the number of steps as a tensor, bitsandbytes as a number.
            number = key == "step" and not isinstance(owner[id(p)], torch.optim.AdamW)
            owner[id(p)].state[p][key] = int(value) if number else self._put(value, p)

    def largest_on_device(self) -> int:
        """Bytes of state that are on the device beside everything else during a step; 0 where all of it stays there."""
        parts = [sum(v.nbytes for kept in o.state.values() for v in kept.values()) for o in (*self.adamw, *self.muon)]
        return max(parts) if self.away else 0

    def _put(self, value: Tensor, p: nn.Parameter) -> Tensor:
        """A tensor of the state where it is kept."""
        there = value.to(p.device)
        return to_host(there) if self.away else there

    def _parts(self, groups: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The groups of each optimizer: all of them in one, or many small ones."""
        groups = [group for group in groups if group["params"]]
        if not self.away and groups:
            yield groups
        for group in groups if self.away else ():
            part: list[nn.Parameter] = []
            for p in group["params"]:
                if part and sum(each.numel() for each in part) + p.numel() > PART_NUMBERS:
                    yield [{**group, "params": part}]
                    part = []
                part.append(p)
            yield [{**group, "params": part}]


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused; with its moments in eight bits if asked for (Dettmers et al. 2022)."""
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.optimizer != "adamw8bit":
        return torch.optim.AdamW(groups, **options, fused=True)
    optimizer: torch.optim.Optimizer = bitsandbytes("train.optimizer: adamw8bit").optim.AdamW8bit(groups, **options)
    return optimizer


def eight_bit_state(numbers: int) -> int:
    """Bytes of a parameter's moments under adamw8bit; small parameters keep theirs in float32."""
    return 8 * numbers if numbers < 4096 else 2 * numbers + 8 * -(-numbers // 256)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The factor of the peak rate at `step` (1 is the first): linear warm-up, then constant, linear or cosine."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step <= warmup:
        return step / warmup
    if config.schedule == "constant":
        return 1.0
    done = max(0.0, step - 1 - warmup) / max(1.0, steps - warmup)
    shape = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
