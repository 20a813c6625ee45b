"""Tokenizers: how one is loaded, what of it a trained model keeps, and tokens that a recipe adds.

A new token begins as the mean of the tokens that spelled its text before, in the embedding and in the head.
"""

from __future__ import annotations

import hashlib
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from whet.config import ModelConfig
from whet.errors import ModelError
from whet.files import read_json
from whet.models.create import byte_tokenizer
from whet.models.language import TEMPLATE_LOCK, template_of
from whet.models.locate import TEMPLATES, locate
from whet.models.probe import first_line


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a model, with the recipe's new tokens, and its chat template where it gives one."""
    from tokenizers import AddedToken

    tokenizer = _own(config)
    lock, fresh = _template_lock(config), _fresh(config, tokenizer)
    if lock and fresh:
        raise ModelError(
            f"{config.path}: was trained with a tokenizer without {fresh[0]!r}; leave it out of model.add_tokens, or "
            "begin where that model began"
        )
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in fresh])
    if config.chat_template is not None:
        file = TEMPLATES.get(str(config.chat_template), config.chat_template)
        if not file.is_file():
            raise ModelError(f"model.chat_template: no file {file}, and none of ours: {', '.join(TEMPLATES)}")
        tokenizer.chat_template = file.read_text()
    text = template_of(tokenizer)
    if lock not in ("", text, hashlib.sha256(text.encode()).hexdigest()):  # a digest: until November 2026
        remedy = "put that back" if config.chat_template is None else "leave model.chat_template out"
        raise ModelError(
            f"{config.path}: was trained with another chat template than {config.chat_template or 'its folder has'} "
            f"{_difference(lock, text)}; {remedy}"
        )
    return tokenizer


def new_tokens(config: ModelConfig) -> list[str]:
    """Those of `add_tokens` that the model's own tokenizer lacks."""
    return _fresh(config, _own(config)) if config.add_tokens else []


def grow(module: Any, config: ModelConfig, tokenizer: Any) -> None:
    """Give each new token its rows. Raises `ModelError` for a tokenizer with more tokens than the model embeds."""
    fresh, rows = new_tokens(config), module.get_input_embeddings().weight.shape[0]
    if len(tokenizer) - len(fresh) > rows:
        raise ModelError(
            f"{config.path}: the tokenizer has {len(tokenizer) - len(fresh)} tokens, the model embeds only {rows}; "
            "they do not belong together"
        )
    if not fresh:
        return
    if len(tokenizer) > rows:
        module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pieces, places = _own(config)(fresh, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(fresh)
    layers = filter(None, {module.get_input_embeddings(), module.get_output_embeddings()})
    with torch.no_grad():
        for tensor in [t for layer in layers for t in (layer.weight, getattr(layer, "bias", None)) if t is not None]:
            for place, spelled in zip(places, pieces, strict=True):
                tensor[place] = tensor[spelled].mean(0)


def require_trained(module: Any, config: ModelConfig) -> None:
    """Raise `ModelError` where an adapter leaves the rows of new tokens as they began."""
    layers = list(filter(None, (module.get_input_embeddings(), module.get_output_embeddings())))
    if new_tokens(config) and not all(any(p.requires_grad for p in layer.parameters()) for layer in layers):
        names = ", ".join(name.rpartition(".")[2] for name, part in module.named_modules() if part in layers)
        raise ModelError(
            f"model.add_tokens: an adapter leaves new rows alone; set train.lora.modules_to_save: [{names}]"
        )


def _own(config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    if config.path == "whet:tiny":
        return byte_tokenizer()
    where, revision = locate(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{config.path}: no tokenizer could be loaded ({first_line(error)})") from error
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:  # what it makes of a directory without one
        raise ModelError(f"{config.path}: has no tokenizer; copy the tokenizer's files of the base model there")
    return tokenizer


def _fresh(config: ModelConfig, tokenizer: Any) -> list[str]:
    known = tokenizer.get_vocab() if config.add_tokens else {}
    return [word for word in dict.fromkeys(config.add_tokens or ()) if word not in known]


def _template_lock(config: ModelConfig) -> str:
    """The template that a stage trained a model of files with; empty for any other model."""
    if config.path == "whet:tiny":
        return ""
    file = Path(locate(config.path)[0]) / "config.json"
    return str(read_json(file).get(TEMPLATE_LOCK, "")) if file.is_file() else ""


def require_same_tokens(model: ModelConfig, policy: ModelConfig) -> None:
    """Raise `ModelError` where a model reads the policy's tokens as other text than the policy does.

    The model is a critic, a reward model or a teacher.
    """
    theirs, ours = (load_tokenizer(config).get_vocab() for config in (model, policy))
    differing = sorted(text for text in theirs.keys() | ours.keys() if theirs.get(text) != ours.get(text))
    if differing:
        first = differing[0]
        raise ModelError(
            f"{model.path}: its tokenizer is not that of {policy.path} ({len(differing):,} tokens differ; {first!r} is "
            f"{theirs.get(first)} there and {ours.get(first)} here), so it would read other text than was sampled; "
            "take one with the policy's tokenizer (a teacher with another can still write rows for SFT)"
        )


def require_same_template(model: ModelConfig, other: ModelConfig) -> None:
    """Raise `ModelError` where two models have other chat templates, their own or those that are given."""
    theirs, ours = (template_of(load_tokenizer(config)) for config in (model, other))
    if theirs != ours:
        whose = f"{model.path}: its chat template" if model.chat_template is None else str(model.chat_template)
        raise ModelError(f"{whose} is not that of {other.path} {_difference(theirs, ours)}")


def _difference(theirs: str, ours: str) -> str:
    """`(line 3 is '...' there and '...' here)`."""
    pairs = enumerate(zip_longest(theirs.splitlines(), ours.splitlines()), start=1)
    line, (there, here) = next((line, pair) for line, pair in pairs if pair[0] != pair[1])
    return f"(line {line} is {(there or '')[:80]!r} there and {(here or '')[:80]!r} here)"
