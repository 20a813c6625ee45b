"""Several models as one: loaded one after another, merged tensor by tensor in the first one's place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.config import MergeInput, ModelConfig
from whet.errors import ModelError
from whet.models.language import TEMPLATE_LOCK, LanguageModel
from whet.models.load import load_adapter, load_model
from whet.models.tokenizer import require_same_template, require_same_tokens

PLACE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", TEMPLATE_LOCK}
"""What a configuration says of where it comes from, and not of what is computed."""

Merge = Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]
"""(the base's tensor, those of the inputs, their weights); without a base the first input stands in its place."""


def merge_models(
    inputs: Sequence[MergeInput], base: ModelConfig | None, merge: Merge, stop_ids: Collection[int], folder: Path
) -> LanguageModel:
    """The merged model. `folder` is for inputs with an adapter, whose sums are written there first.

    Raises `ModelError` where one has another tokenizer, template, configuration or shape than the first, by name.
    """
    plain: list[ModelConfig] = [_with_adapter(each, folder / str(place)) for place, each in enumerate(inputs)]
    first, *others = plain
    for other in [*others, *([base] if base is not None else [])]:
        require_same_tokens(other, first)
        require_same_template(other, first)
    merged = load_model(first, stop_ids=stop_ids)
    if merged.routing is not None:
        raise ModelError(f"{first.path}: has routed adapters, and no weights that could be merged hold them")
    states = [merged.module.state_dict(), *(_state(other, merged.module, first.path) for other in others)]
    start = states[0] if base is None else _state(base, merged.module, first.path)
    weights = [each.weight for each in inputs]
    done: set[int] = set()  # tied tensors stand there twice
    with torch.no_grad():
        for name, tensor in merged.module.state_dict().items():
            if tensor.is_floating_point() and tensor.data_ptr() not in done:
                tensor.copy_(merge(start[name], [state[name] for state in states], weights))
                done.add(tensor.data_ptr())
    return merged


def _with_adapter(config: MergeInput, folder: Path) -> ModelConfig:
    if config.adapter is None:
        return config.alone()
    model = load_adapter(config.alone(), config.adapter)
    model.export(folder)
    return config.alone().at(str(folder))


def _state(config: ModelConfig, like: Any, whose: str) -> dict[str, Tensor]:
    """The tensors of a model that has the configuration of another."""
    module = load_model(config).module
    theirs, ours = (each.config.to_dict() for each in (module, like))
    for key in sorted(theirs.keys() | ours.keys()):
        if key not in PLACE and not key.endswith("token_id") and theirs.get(key) != ours.get(key):
            raise ModelError(
                f"{config.path}: {key} is {theirs.get(key)} and that of {whose} {ours.get(key)}; only models of one "
                "shape can be merged"
            )
    state: dict[str, Tensor] = module.state_dict()
    return state
