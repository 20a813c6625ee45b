"""A tiny model to begin with: Qwen3 architecture, byte-level tokenizer, ChatML template.

The tokenizer spells any text as bytes, and has single tokens for chat markup and for the tags of the R1 format, so
that a model of half a million parameters can play the whole game.
"""

from __future__ import annotations

from typing import Any

import torch

from whet.config import CreateConfig

MARKUP = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("<think>", "</think>", "<answer>", "</answer>", "system", "user", "assistant")
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def byte_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` with 256 byte tokens, chat markup and reasoning tags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in MARKUP])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in WORDS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=MARKUP[2], pad_token=MARKUP[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def create_model(config: CreateConfig, tokenizer: Any) -> Any:
    """A Qwen3 causal LM with random weights, the same for the same seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.hidden_size // config.heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_length,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        )
    module.generation_config.eos_token_id = tokenizer.eos_token_id
    module.generation_config.pad_token_id = tokenizer.pad_token_id
    return module
