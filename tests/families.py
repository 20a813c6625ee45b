"""Tiny models of the common families, from configurations with random weights: what docs/models.md is checked against.

The weights are scaled up, so that a layer which is computed wrongly shows in the outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from whet.models.create import byte_tokenizer

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen 2, Qwen 2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen 3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "Qwen 3 mixture of experts": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED}),
    "Gemma 3, text": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED}),
    "Phi-3, Phi-4": ("phi3", {"pad_token_id": 0}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOWED),
    "SmolLM 3": ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "Granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "Cohere Command R": ("cohere", {"logit_scale": 0.25}),
    "Cohere Command R7B": ("cohere2", {"logit_scale": 0.25, **WINDOWED}),
    "GLM-4": ("glm4", {"head_dim": 8, "pad_token_id": 0}),
    "GLM-4.5": ("glm4_moe", {"head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS}),
    "gpt-oss": ("gpt_oss", {"head_dim": 8, **WINDOWED, **EXPERTS}),
    "Llama 4, text": (
        "llama4_text",
        {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 64, "pad_token_id": 0, **EXPERTS},
    ),
    "DeepSeek V3": (
        "deepseek_v3",
        {
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            **LATENT,
            **EXPERTS,
        },
    ),
    "DeepSeek V2": (
        "deepseek_v2",
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
        | LATENT
        | EXPERTS,
    ),
    "EXAONE 4": ("exaone4", {"head_dim": 8, **WINDOWED}),
    "Apertus": ("apertus", {}),
    "ERNIE 4.5": ("ernie4_5", {"head_dim": 8}),
    "Hunyuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite mixture of experts": ("granitemoe", EXPERTS),
    "Gemma 4, text": (
        "gemma4_text",
        {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 266}
        | WINDOWED,
    ),
    "MiniMax M2": ("minimax_m2", {"head_dim": 8, **EXPERTS}),
    "Ministral 3": ("ministral3", {"head_dim": 8}),
    "Phi-1.5, Phi-2": ("phi", {}),
    "Phi-3.5 mixture of experts": ("phimoe", EXPERTS),
    "Qwen 3.5": (
        "qwen3_5_text",
        {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "Granite 4": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, **MAMBA, **EXPERTS},
    ),
    "MiniMax M1": ("minimax", {"head_dim": 8, **EXPERTS}),
    "GPT-J": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}),
    "Seed-OSS": ("seed_oss", {"head_dim": 8, "attention_dropout": 0.1, "residual_dropout": 0.1}),
    "Ministral": ("ministral", {"head_dim": 8, **WINDOWED}),
    "Nemotron": ("nemotron", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder 2": ("starcoder2", {}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "Falcon": ("falcon", {}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "MPT": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "Falcon-H1": ("falcon_h1", MAMBA),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "num_experts": 2,
        },
    ),
    "Qwen 3 Next": (
        "qwen3_next",
        {
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
            **EXPERTS,
        },
    ),
    "Mamba": ("mamba", {"state_size": 8}),
    "RWKV": ("rwkv", {"attention_hidden_size": 32}),
}

STATE = "carries state from token to token outside attention"
OWN = "outside transformers' attention interface"
DEAF = "by layers that drop keyword arguments"
NOISE = "draws random numbers while it trains"
REFUSED = {
    "Nemotron": DEAF,
    "StableLM": OWN,
    "Falcon": OWN,
    "BLOOM": OWN,
    "MPT": OWN,
    "Falcon-H1": STATE,
    "LFM2": STATE,
    "Jamba": STATE,
    "Qwen 3 Next": STATE,
    "Mamba": STATE,
    "RWKV": OWN,
    "GPT-J": OWN,
    "Qwen 3.5": STATE,
    "Granite 4": STATE,
    "MiniMax M1": STATE,
    "Phi-3.5 mixture of experts": NOISE,
}
"""Families that do not load, and what the one line says."""
HEADLESS = {
    "Apertus",
    "Cohere Command R",
    "Cohere Command R7B",
    "ERNIE 4.5",
    "GLM-4.5",
    "Gemma 4, text",
    "Granite",
    "Granite mixture of experts",
    "Llama 4, text",
    "MiniMax M2",
    "OLMoE",
}
"""Families of which transformers has no sequence classifier."""

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPERS = {
    "Gemma 3": ("gemma3", "Gemma 3, text", {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "Mistral Small 3.1": ("mistral3", "Mistral", {"vision_config": {"model_type": "pixtral", **VISION}}),
    "Llama 4": (
        "llama4",
        "Llama 4, text",
        {"vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}},
    ),
}
"""Models of text and images: kind, family of the text model inside, what they have beside it."""


def table() -> str:
    """The families as docs/models.md has them, each with what the load says of it."""
    lines = ["| family | `model_type` | trains, samples, exports | reward model |", "|---|---|---|---|"]
    rows = [(name, kind, REFUSED.get(name)) for name, (kind, _) in FAMILIES.items()]
    rows += [(f"{name}, text and images", kind, None) for name, (kind, _, _) in WRAPPERS.items()]
    for name, kind, reason in sorted(rows, key=lambda row: (row[2] is not None, row[0].lower())):
        verdict = f"no: {reason}" if reason else "its text model" if "images" in name else "yes"
        head = "" if reason else "no" if "images" in name or name in HEADLESS else "yes"
        lines.append(f"| {name} | `{kind}` | {verdict} | {head} |")
    return "\n".join(lines)


def make_wrapper(name: str, folder: Path) -> Path:
    """A directory with a tiny model of text and images, as its class is published."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    kind, inner, beside = WRAPPERS[name]
    family, special = FAMILIES[inner]
    tokenizer = byte_tokenizer()
    text = {"model_type": family, **SHAPE, **_ends(tokenizer), **special, "vocab_size": len(tokenizer)}
    _save(AutoModelForImageTextToText, AutoConfig.for_model(kind, text_config=text, **beside), tokenizer, folder, 4.0)
    return folder


def make(name: str, folder: Path, scale: float = 4.0, **more: Any) -> Path:
    """A directory with the family's tiny model: config, safetensors, byte-level tokenizer and ChatML template."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, special = FAMILIES[name]
    tokenizer = byte_tokenizer()
    settings = {**SHAPE, **_ends(tokenizer), **special, **more, "vocab_size": len(tokenizer)}
    _save(AutoModelForCausalLM, AutoConfig.for_model(kind, **settings), tokenizer, folder, scale)
    return folder


def _ends(tokenizer: Any) -> dict[str, Any]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path, scale: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
