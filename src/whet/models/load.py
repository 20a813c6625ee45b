"""Loading: a hub id, a directory or a built-in name becomes a `LanguageModel`, or one line says why not.

Safetensors only, no remote code. Before a model is handed out, its packed forward pass is compared with
transformers' own on a short probe: an architecture that our attention would compute differently is refused here,
by name, and not discovered in a loss curve.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from whet.config import LoraConfig, ModelConfig
from whet.errors import ModelError
from whet.files import Digests
from whet.models.adapters import put_adapters
from whet.models.architecture import (
    load_causal,
    max_row_tokens,
    refuse_unpackable,
    settle_positions,
    tell_window,
    text_config,
    without_randomness,
)
from whet.models.armo import load_gate
from whet.models.attention import ATTENTION, attend
from whet.models.compiled import compile_layers
from whet.models.create import create_model
from whet.models.device import pick_compute, pick_device
from whet.models.heads import add_score, load_scalar, objectives_of, reward_facts, scalar_from_causal
from whet.models.language import ROUTED, LanguageModel
from whet.models.layers import simplify
from whet.models.locate import locate
from whet.models.matmul import adopt
from whet.models.probe import check_forward, first_line
from whet.models.quantize import is_quantised, keep_layout, nf4_options
from whet.models.tokenizer import grow, load_tokenizer, require_trained

CONTENTS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
"""Suffixes of the files of a model directory."""


def load_model(
    config: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    checkpointing: bool = False,
    quantised: bool = False,
    with_score: bool = False,
    compiled: bool = False,
    stop_ids: Collection[int] = (),
) -> LanguageModel:
    """A causal LM: weights and tokenizer, an adapter if asked for, the forward pass checked.

    `quantised`: its matrices as NF4 (`models.quantize`). `with_score` puts a scalar head beside its vocabulary: a
    critic on the policy's own trunk. `compiled`: its layers by torch (`models.compiled`). `stop_ids`: the tokens that
    end a turn, for an export.
    """
    tokenizer = load_tokenizer(config)
    module = _load_module(config, tokenizer, quantised=quantised)
    language = _language_model(
        config, module, tokenizer, lora=lora, checkpointing=checkpointing, with_score=with_score, compiled=compiled
    )
    return replace(language, stop_ids=frozenset(stop_ids))


def load_adapter(config: ModelConfig, folder: Path) -> LanguageModel:
    """A causal LM with an adapter from peft's files, to be exported. Raises `ModelError` where it does not belong."""
    from peft import PeftModel

    language = load_model(config)
    if language.adapter is not None:
        raise ModelError(f"{config.path}: has routed adapters, beside which no other goes")
    try:
        adapter = PeftModel.from_pretrained(language.module, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: is no adapter of {config.path} ({first_line(error)})") from error
    return replace(language, adapter=adapter)


def load_scalar_model(
    config: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    checkpointing: bool = False,
    quantised: bool = False,
    new_head: bool = True,
    compiled: bool = False,
    objectives: Sequence[str] = (),
) -> LanguageModel:
    """A model that gives numbers, not tokens (a critic, a reward model), from a policy's weights or its own kind's.

    A policy's weights get a head that says 0, with an output for each of `objectives` (none: one); where `new_head` is
    False they are refused.
    """
    tokenizer = load_tokenizer(config)
    module = _load_module(config, tokenizer, scalar=True, quantised=quantised, objectives=objectives)
    if not new_head and not module.score.weight.any():
        raise ModelError(f"{config.path}: has no scalar head that was trained; make one in a reward_model stage")
    if module.config.pad_token_id is None:  # transformers reads a score at the last token that is not padding
        module.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    lora = lora and lora.model_copy(update={"routed": None})  # it writes no call
    language = _language_model(config, module, tokenizer, lora=lora, checkpointing=checkpointing, compiled=compiled)
    facts = reward_facts(module)
    if facts is None or facts.gate is None:
        return language
    try:
        gate = load_gate(facts.gate, objectives_of(module), module, *locate(config.path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{config.path}: its gate could not be loaded ({first_line(error)})") from error
    return replace(language, gate=gate)


def load_skeleton(
    config: ModelConfig, *, lora: LoraConfig | None = None, checkpointing: bool = False, scalar: bool = False
) -> LanguageModel:
    """The model from its configuration alone, on torch's meta device: shapes without content, and no tokenizer.

    `scalar`: the model that `load_scalar_model` would make of it.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, attend)
    with torch.device("meta"):
        if config.path == "whet:tiny":
            module = create_model(config.create, load_tokenizer(config))
        else:
            module = AutoModelForCausalLM.from_config(text_config(_read_config(config)), dtype=torch.float32)
        module = scalar_from_causal(module) if scalar else module
        return _language_model(config, module, None, lora=lora, checkpointing=checkpointing, probe=False)


def read_max_length(config: ModelConfig) -> int:
    """Tokens of the longest row that the model computes, from its configuration, without loading weights."""
    if config.path == "whet:tiny":
        return config.create.max_length
    found = _read_config(config)
    tell_window(config.path, found)
    return max_row_tokens(found)


def read_vocabulary(config: ModelConfig) -> int:
    """Rows of the output head, from the configuration and what the recipe adds to them."""
    rows = 0 if config.path == "whet:tiny" else int(text_config(_read_config(config)).vocab_size)
    return max(rows, len(load_tokenizer(config)))


def read_contents(config: ModelConfig, digests: Digests) -> dict[str, Any]:
    """`files`: the SHA-256 of every file that loading reads, by name. Of a hub model its `commit`, which fixes them.

    Nothing of `whet:tiny`, which is all configuration. Raises `ModelError` where there is no such model.
    """
    from transformers.utils.hub import cached_file

    if config.path == "whet:tiny":
        return {}
    where, revision = locate(config.path)
    if Path(where).is_dir():
        folder = Path(where)
        files = [file for file in sorted(folder.iterdir()) if file.suffix in CONTENTS and file.is_file()]
        files += sorted(folder.glob("adapter/*/*.safetensors"))  # of routed adapters, which are in no weights
        return {"files": {str(file.relative_to(folder)): {"sha256": digests.of(file).sha256} for file in files}}
    try:
        found = cached_file(where, "config.json", revision=revision)
    except OSError as error:
        raise ModelError(f"{config.path}: no model configuration could be read ({first_line(error)})") from error
    return {"commit": Path(str(found)).parent.name}


def read_eos_ids(config: ModelConfig) -> tuple[int, ...]:
    """What the model's generation config calls ends of text; some models (Llama 3) have several."""
    from transformers import GenerationConfig

    if config.path == "whet:tiny":
        return ()
    where, revision = locate(config.path)
    try:
        eos = GenerationConfig.from_pretrained(where, revision=revision or "main").eos_token_id
    except OSError:  # a model may come without a generation config; its tokenizer then says where a turn ends
        return ()
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _load_module(
    config: ModelConfig,
    tokenizer: Any,
    *,
    scalar: bool = False,
    quantised: bool = False,
    objectives: Sequence[str] = (),
) -> Any:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if config.path == "whet:tiny":
        if quantised:
            raise ModelError("whet:tiny is made, not loaded, so it has nothing to quantise; leave train.quantize out")
        created = create_model(config.create, tokenizer)
        return scalar_from_causal(created, objectives) if scalar else created
    where, revision = locate(config.path)
    device = pick_device(config.device)
    options = nf4_options(device, pick_compute(config.dtype, device)) if quantised else {}
    found = without_randomness(_read_config(config), config.path)
    load = partial(load_scalar, objectives=objectives) if scalar else partial(load_causal, name=config.path)
    try:
        module: Any = load(
            where,
            config=found,
            revision=revision,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{config.path}: the model could not be loaded ({first_line(error)})") from error
    if scalar and hasattr(module.config, ROUTED):
        raise ModelError(f"{config.path}: has routed adapters, and no scalar head goes beside them")
    grow(module, config, tokenizer)
    return module


def _read_config(config: ModelConfig) -> Any:
    """The transformers configuration of a model that has files."""
    from transformers import AutoConfig

    where, revision = locate(config.path)
    try:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{config.path}: no model configuration could be read ({first_line(error)})") from error


def _language_model(
    config: ModelConfig,
    module: Any,
    tokenizer: Any,
    *,
    lora: LoraConfig | None,
    checkpointing: bool,
    with_score: bool = False,
    compiled: bool = False,
    probe: bool = True,
) -> LanguageModel:
    """The loaded module on its device, checked, with our attention and whatever was asked for inside."""
    device = pick_device(config.device)
    if probe:  # a skeleton has nothing to move and nothing to check
        # Quantised weights are where they were read to already.
        module = keep_layout(module) if is_quantised(module) else module.to(device)
        refuse_unpackable(module, config.path)
        settle_positions(module)
        check_forward(module, config.path)
    module.config._attn_implementation = ATTENTION
    if device.type == "cpu":
        adopt(module)
        if not compiled:
            simplify(module)
    with warnings.catch_warnings():
        # transformers renames these calls; peft and the oldest version that we support have the old names.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
        warnings.filterwarnings("ignore", module="peft")  # of patterns that it made itself, and of tied heads
        adapter, routing = put_adapters(module, lora, config, tokenizer, device)
        if lora:
            require_trained(module, config)
        if with_score:
            add_score(module)
        if checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(module, device)
    return LanguageModel(
        module=module,
        tokenizer=tokenizer,
        name=config.path,
        max_length=max_row_tokens(module.config),
        device=device,
        compute=pick_compute(config.dtype, device),
        adapter=adapter,
        routing=routing,
    )
