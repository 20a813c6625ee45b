"""Low-rank adapters around a loaded module: one, or two that tokens are routed through by their roles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whet.config import LoraConfig, ModelConfig
from whet.config.train import MarksConfig
from whet.errors import ModelError
from whet.files import read_json
from whet.models.heads import SCORE, is_scalar
from whet.models.language import ROUTED
from whet.models.locate import locate
from whet.models.marks import ADAPTERS, RoleTable, Routing
from whet.models.probe import first_line


def put_adapters(
    module: Any, lora: LoraConfig | None, config: ModelConfig, tokenizer: Any, device: torch.device
) -> tuple[Any, Routing | None]:
    """(the peft model around a module, what routes its two adapters); None for what there is not.

    A model that was written with routed adapters has them back, to be sampled from or trained on.
    """
    written: Mapping[str, Sequence[str]] | None = getattr(module.config, ROUTED, None)
    held = None if written is None else {role: (pair[0], pair[1]) for role, pair in written.items()}
    if lora is None and held is not None and tokenizer is None:  # a skeleton has shapes alone
        lora, held = _written(config), None
    if lora is None and held is None:
        return None, None
    if held is not None and lora is not None:
        raise ModelError(f"{config.path}: has routed adapters, which go on being trained; leave train.lora out")
    adapter = _load_routed(module, config) if lora is None else _add_lora(module, lora)
    marks = held if lora is None else None if lora.routed is None else lora.routed.marks
    if marks is None or tokenizer is None:
        return adapter, None
    strange = [n for n, p in module.named_parameters() if p.requires_grad and not re.search(r"\.lora_[AB]\.", n)]
    if strange or hasattr(module.get_output_embeddings(), "lora_A"):
        what = strange[0] if strange else "the output head"
        raise ModelError(f"train.lora.routed: {what} cannot be routed by tokens; name linear layers inside as targets")
    table = RoleTable.of(tokenizer, module.get_output_embeddings().weight.shape[0], marks)
    return adapter, Routing(marks, table, adapter, device)


def _load_routed(module: Any, config: ModelConfig) -> Any:
    from peft import PeftModel

    folder = Path(locate(config.path)[0]) / "adapter"
    try:
        adapter = PeftModel.from_pretrained(module, str(folder / ADAPTERS[0]), ADAPTERS[0], is_trainable=True)
        adapter.load_adapter(str(folder / ADAPTERS[1]), ADAPTERS[1], is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: its routed adapters cannot be read ({first_line(error)})") from error
    _use_both(adapter)
    return adapter


def _written(config: ModelConfig) -> LoraConfig:
    """How large routed adapters are."""
    facts = read_json(Path(locate(config.path)[0]) / "adapter" / ADAPTERS[0] / "adapter_config.json")
    return LoraConfig(rank=facts["r"], targets=facts["target_modules"], routed=MarksConfig())


def _use_both(adapter: Any) -> None:
    adapter.base_model.set_adapter(list(ADAPTERS))


def _add_lora(module: Any, config: LoraConfig) -> Any:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    scalar = is_scalar(module)
    # A linear layer of an architecture's own (Llama 4's router) returns more than a product, and an embedding of
    # anything but tokens is not looked up by them.
    own = [name for name, part in module.named_modules() if _is_own(part, module.get_input_embeddings())]
    for name in config.modules_to_save or ():  # peft passes over what is not there
        if not any(path.endswith(name) for path, _ in module.named_modules()):
            raise ModelError(f"train.lora.modules_to_save: no module is called {name!r}")
    settings = PeftConfig(
        task_type=None if scalar else "CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        modules_to_save=config.modules_to_save,
        exclude_modules=[*own, SCORE] if scalar else own,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    try:
        adapter = get_peft_model(module, settings, "default" if config.routed is None else ADAPTERS[0])
        if config.routed is not None:
            adapter.add_adapter(ADAPTERS[1], settings)
            _use_both(adapter)
    except ValueError as error:  # no layer of such a name
        raise ModelError(f"train.lora.targets: {first_line(error)}") from error
    if scalar:  # the head is new, so it is trained itself
        module.score.requires_grad_(True)
    return adapter


def _is_own(part: Any, embedding: Any) -> bool:
    """Whether a layer is linear or an embedding by its class and not by what it does."""
    own = isinstance(part, nn.Linear) and type(part).__module__.startswith("transformers")
    return own or (isinstance(part, nn.Embedding) and part is not embedding)
