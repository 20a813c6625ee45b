"""What whet must know of an architecture beyond its modules: read from its configuration, for every family alike.

Random layers are switched off, the text model is taken out of a model of text and images, rows are limited to the
lengths at which positions mean the same in every row, and architectures that a packed forward pass cannot serve are
refused with the reason. What this page gets wrong the load probe (`models.probe`) finds.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from whet.errors import ModelError
from whet.formulas.logprobs import LogitRule

RANDOM = ("dropout", "pdrop", "layerdrop")
"""Parts of the names of configuration keys that make a forward pass in training random."""
OTHER_HEADS = ("classifier_", "summary_")
"""Beginnings of such keys that concern heads which whet does not use."""
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers (`layer_types` of a configuration) that mix tokens by attention alone."""
LENGTHS = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
"""Names of the longest row in configurations."""

_log = logging.getLogger(__name__)


def text_config(config: Any) -> Any:
    """The configuration of the decoder: a model of text and images has one inside its own."""
    return config.get_text_config(decoder=True)


def without_randomness(config: Any, name: str) -> Any:
    """The configuration with dropout and its kin set to 0, in place; names what was set."""
    text = text_config(config)
    found = {
        key: value
        for key, value in text.to_dict().items()
        if any(part in key for part in RANDOM) and not key.startswith(OTHER_HEADS)
        if isinstance(value, float) and value > 0
    }
    for key in found:
        setattr(text, key, 0.0)
    if found:
        keys = ", ".join(f"{key}: {value:g}" for key, value in found.items())
        _tell(f"{name}: trained without dropout (its configuration has {keys})")
    return config


def max_row_tokens(config: Any) -> int:
    """Tokens of the longest row that the decoder computes as transformers does for that row alone.

    A LongRoPE model takes other angles for all tokens of a row that is longer than its original window, and a Llama 4
    splits a row into chunks and scales its queries from a length on: rows that share a prompt or a micro-batch may not
    differ in such ways, so they stay below it. Raises `ModelError` where the configuration has no length.
    """
    return min(_row_limits(config).values())


def tell_window(name: str, config: Any) -> None:
    """Say, once for a model, why its rows may not be as long as its configuration allows."""
    limits = _row_limits(config)
    reason = min(limits, key=lambda key: limits[key])
    if limits[reason] < next(iter(limits.values())):
        _tell(f"{name}: takes rows of up to {limits[reason]:,} tokens; longer ones have {reason}")


@cache
def _tell(what: str) -> None:
    _log.warning("%s", what)


def _row_limits(config: Any) -> dict[str, int]:
    """What limits a row, and to how many tokens; the configuration's own length first."""
    text = text_config(config)
    length = next((int(getattr(text, key)) for key in LENGTHS if getattr(text, key, None)), None)
    if length is None:
        raise ModelError(f"{text.model_type}: its configuration has no max_position_embeddings")
    limits = {"no positions": length}
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one for a kind of layer
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            limits["other rotary angles for all their tokens (LongRoPE)"] = int(
                kind["original_max_position_embeddings"]
            )
    if getattr(text, "attention_chunk_size", None):
        limits["several chunks of attention"] = int(text.attention_chunk_size)
    if getattr(text, "attn_temperature_tuning", None):
        limits["queries scaled by their position"] = int(text.floor_scale) - 1
    return limits


def load_causal(where: str, *, config: Any, name: str, **options: Any) -> Any:
    """The causal LM of a directory or hub id; of a model of text and images its text model, over the same tensors.

    Raises `ModelError` where weights are missing, and whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text, causal = text_config(config), AutoModelForCausalLM._model_mapping
    if type(text) not in causal:
        raise ModelError(f"{name}: transformers has no causal language model of {text.model_type}")
    reader: Any = AutoModelForCausalLM if type(config) in causal else AutoModelForImageTextToText
    module, found = reader.from_pretrained(where, config=config, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{name}: weights are missing for {', '.join(missing[:3])}; the files are not all of the model"
        )
    if text is not config:
        module = _text_model(module, causal[type(text)], name)
        _tell(f"{name}: only its text model is trained and exported ({type(module).__name__})")
    return module


def _text_model(module: Any, causal: Any, name: str) -> Any:
    """The text model inside a model of text and images, as a causal LM of this class."""
    if type(module) is causal:
        return module
    text, head = text_config(module.config), module.get_output_embeddings()
    text.tie_word_embeddings = head.weight is module.get_input_embeddings().weight
    with torch.device("meta"):
        inner: Any = causal(text)
    decoder, found = decoder_of(inner), decoder_of(module)
    if type(found) is not type(decoder):
        raise ModelError(f"{name}: {type(module).__name__} has no {type(decoder).__name__} inside to train")
    (place,) = (child for child, part in inner.named_children() if part is decoder)
    setattr(inner, place, found)
    inner.set_output_embeddings(head)
    inner.generation_config = module.generation_config
    return inner


def decoder_of(module: Any) -> Any:
    """The stack of layers below the head."""
    decoder = module.get_decoder()
    return module.model if decoder is module else decoder  # Llama 4's text model calls its base another name


def layers_of(module: Any) -> list[nn.Module]:
    """The decoder's layers, as transformers tells them from their parts."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in decoder_of(module).modules() if isinstance(part, GradientCheckpointingLayer)]


def logit_rule(config: Any) -> LogitRule:
    """Granite divides by a number, Cohere multiplies by one, Gemma 2 caps."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LogitRule(scale=scale, cap=getattr(config, "final_logit_softcapping", None))


def refuse_unpackable(module: Any, name: str) -> None:
    """Raise `ModelError` for an architecture whose layers mix tokens in a way that cannot be packed."""
    kind = type(module).__name__
    mixing = [type(part).__name__ for part in decoder_of(module).modules() if _has_convolution(part)]
    mixing += sorted(set(getattr(text_config(module.config), "layer_types", None) or ()) - ATTENDING)
    if mixing:
        raise ModelError(
            f"{name}: {kind} carries state from token to token outside attention ({mixing[0]}), which rows packed "
            "together or sharing a prompt would pass on to each other; use a model of attention layers only"
        )
    if not module._supports_attention_backend:
        raise ModelError(
            f"{name}: {kind} has attention (or recurrence) of its own, outside transformers' attention interface, so "
            "rows cannot be packed; use a model that supports attention backends"
        )


def settle_positions(module: Any) -> None:
    """Switch off what is exactly 1 below `max_row_tokens` and counts places in the stream instead of positions."""
    for part in module.modules():
        if getattr(part, "attn_temperature_tuning", None):  # Llama 4
            part.attn_temperature_tuning = False


def _has_convolution(part: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv1d) for child in part.children())
