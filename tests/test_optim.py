"""Optimizers: what a recipe's keys do under each of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whet.config import TrainConfig
from whet.training.optim import Optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_decoupled_and_of_matrices_alone(optimizer: str) -> None:
    """With a gradient of zero a step leaves p (1 - lr decay) of a matrix, and all of a vector; any optimizer."""
    torch.manual_seed(0)
    named = {"layers.0.weight": nn.Parameter(torch.randn(4, 3)), "norm.weight": nn.Parameter(torch.randn(4))}
    before = {name: p.detach().clone() for name, p in named.items()}
    config = TrainConfig.model_validate({"optimizer": optimizer, "lr": 0.1, "muon_lr": 0.2, "weight_decay": 0.5})
    optimizers = Optimizers(named, config)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizers.step(0.5)
    rate = {"adamw": 0.1, "muon": 0.2}[optimizer] * 0.5
    torch.testing.assert_close(named["layers.0.weight"].data, before["layers.0.weight"] * (1 - rate * 0.5))
    torch.testing.assert_close(named["norm.weight"].data, before["norm.weight"])
