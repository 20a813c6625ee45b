"""Weights in four bits and optimizer states in eight, by bitsandbytes: the one place that knows it.

QLoRA (Dettmers et al. 2023): the base model's matrices are kept as NF4, blocks of 64 numbers on 16 levels, and only
an adapter over them is trained. The head and the embeddings stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from whet.errors import MissingExtra

KEPT = ["lm_head", "score"]
"""Layers that stay in full precision."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of one quantised number: four bits, its block's scale in eight bits, and that scale's own."""


def bitsandbytes(asked_by: str) -> Any:
    """The library; `MissingExtra` with the pip command where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it could download
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise MissingExtra(
            f"{asked_by} needs bitsandbytes, which is not installed: pip install 'whet[quant]'"
        ) from error
    return library


def nf4_options(device: torch.device, compute: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told, so that each matrix is quantised as it is read."""
    from transformers import BitsAndBytesConfig

    bitsandbytes("train.quantize: nf4")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=KEPT,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_layout(module: Any) -> Any:
    """The same model, whose weights stay as they were read.

    On a CPU with bfloat16 units bitsandbytes would repack them at the first look without a gradient, in place and not
    for every shape; training and sampling are to see the same numbers.
    """
    for layer in module.modules():
        if isinstance(layer, bitsandbytes("train.quantize: nf4").nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return module


def quantisable(module: Any) -> list[Tensor]:
    """The frozen matrices of a model that are quantised when it is loaded so."""
    linears = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    named = {name: m.weight for name, m in linears.items() if not m.weight.requires_grad}
    return [weight for name, weight in named.items() if not any(part in KEPT for part in name.split("."))]


def is_quantised(module: Any) -> bool:
    """Whether a model was loaded with `nf4_options`."""
    return "quantization_config" in module.config.to_dict()


def dequantised(tensor: Tensor) -> Tensor:
    """The numbers that a quantised tensor stands for; any other as it is."""
    quantised = tensor.__dict__.get("quant_state")
    if quantised is None:
        return tensor.detach()
    return torch.as_tensor(bitsandbytes("export").functional.dequantize_4bit(tensor.data, quantised))
