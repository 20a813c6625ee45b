"""A model as Hugging Face's layout: what is written computes what was trained.

An adapter is written twice: in peft's files, and added to the weights. The sums are made beside the model, tensor by
tensor; nothing is merged in place, where a tied head would change the embedding, four bits would round the sum, and
taking it out again would change the weights. A head that no longer equals the embedding is written apart from it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whet.models.heads import SCORE, is_scalar
from whet.models.quantize import dequantised

WRAPPED = ("base_layer", "modules_to_save", "default")
"""Where peft keeps a module that it has put an adapter around, or its trained copy."""
BEFORE = ".original_module."
"""Where it keeps a module that it trains a copy of."""


def save_model(module: Any, adapter: Any, folder: Path, stop_ids: Collection[int], *, merged: bool = True) -> None:
    """Config, generation config and safetensors; with an adapter, `merged` into them or not, also `folder/adapter`.

    `stop_ids` join what the generation config calls ends of text, so that `generate` stops where a turn ends.
    """
    if adapter is None:
        state = {name: tensor for name, tensor in module.state_dict().items() if _is_own(module, name)}
        tied = set(module.all_tied_weights_keys or {})
        module.save_pretrained(folder, state_dict={name: t for name, t in state.items() if name not in tied})
    else:
        with warnings.catch_warnings():  # of adapters on tied heads, which are written apart below
            warnings.filterwarnings("ignore", module="peft")
            adapter.save_pretrained(folder / "adapter")
        _save_merged(adapter.get_base_model(), folder, merged=merged)
    if module.can_generate():
        generation = copy.deepcopy(module.generation_config)
        known = generation.eos_token_id
        ends = {known} if isinstance(known, int) else set(known or ())
        generation.eos_token_id = sorted(ends | set(stop_ids)) or None
        generation.save_pretrained(folder)


def _save_merged(base: Any, folder: Path, *, merged: bool) -> None:
    """The weights, `merged` with what the adapter adds to them, under a class and names without it."""
    state, changed = _merged(base, merged=merged)
    tied = dict(base.all_tied_weights_keys or {})
    still = {target for target, source in tied.items() if not {target, source} & changed}
    settings = {key: value for key, value in base.config.to_dict().items() if key != "quantization_config"}
    if still != set(tied):
        settings["tie_word_embeddings"] = False
    with torch.device("meta"):
        skeleton = type(base)(type(base.config).from_dict(settings))
    kept = {name: tensor for name, tensor in state.items() if _is_own(base, name)}
    assert kept.keys() == skeleton.state_dict().keys(), "an export has the tensors of its class, by its names"
    skeleton.save_pretrained(folder, state_dict={name: t for name, t in kept.items() if name not in still})


def _merged(base: Any, *, merged: bool) -> tuple[dict[str, Tensor], set[str]]:
    """(Every tensor of the module without its adapter, which of them the adapter has changed), under plain names."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    tensors = {**dict(base.named_parameters(remove_duplicate=False)), **dict(base.named_buffers())}
    kept = [name for name in base.state_dict() if name in tensors and ".lora_" not in name and BEFORE not in name]
    state = {plain_name(name): dequantised(tensors[name]) for name in kept}
    changed = {plain_name(name) for name in kept if ".modules_to_save." in name}
    adapted: list[tuple[str, Any]] = [
        (path, m) for path, m in base.named_modules() if merged and isinstance(m, LoraLayer)
    ]
    for path, layer in adapted:
        leaf = getattr(layer, "parameter_name", "weight")  # experts are parameters, not linear layers
        name = plain_name(f"{path}.{leaf}")
        changed.add(name)
        for active in layer.active_adapters:
            if active in layer.lora_variant:  # DoRA: a direction, and a length of its own
                state[name] = layer.lora_variant[active].merge_safe(layer, active, state[name])
            else:
                state[name] = state[name] + layer.get_delta_weight(active).to(state[name].dtype)
    for path, part in base.named_modules():
        if issubclass(getattr(part, "source_cls", nn.Linear), Conv1D):  # GPT-2's layers are quantised transposed
            name = plain_name(f"{path}.weight")
            state[name] = state[name].T.contiguous()
    return state, changed


def plain_name(name: str) -> str:
    """The name of a tensor as its class has it, without the modules that peft puts around."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _is_own(module: Any, name: str) -> bool:
    """Whether the module's class knows the tensor: a causal LM leaves its critic's head behind."""
    return is_scalar(module) or name != f"{SCORE}.weight"
