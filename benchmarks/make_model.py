"""Models with random weights for the benchmarks, in the Hugging Face layout: `python -m benchmarks.make_model FOLDER`.

The tokenizer spells text as bytes, so a text has as many tokens as bytes; the rest of the vocabulary is filler that
only a model with random weights ever says. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from whet.models.create import CHAT_TEMPLATE, MARKUP


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 model."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool


SHAPES = {
    "small": Shape(4096, 256, 6, 4, 2, 768, True),  # 5.8M parameters
    "base60": Shape(32768, 512, 8, 8, 4, 1536, False),  # 58.7M
    "wide": Shape(151936, 128, 2, 4, 2, 384, True),  # 20M, nearly all of it vocabulary
}


def make(folder: Path, shape: Shape) -> None:
    """Write the model and its tokenizer, the same on every call."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"extra{i}" for i in range(shape.vocabulary - len(MARKUP) - len(letters))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*MARKUP, *letters, *filler])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(MARKUP))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=MARKUP[2], pad_token=MARKUP[0])
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    module = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(fast),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=4096,
            tie_word_embeddings=shape.tied,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            bos_token_id=None,
        )
    )
    module.generation_config.eos_token_id = fast.eos_token_id
    module.generation_config.pad_token_id = fast.pad_token_id
    module.save_pretrained(folder)
    fast.save_pretrained(folder)


def ready(root: Path, name: str) -> Path:
    """The folder of a model, made if it is not there."""
    folder = root / name
    if not (folder / "tokenizer_config.json").is_file():
        make(folder, SHAPES[name])
    return folder


if __name__ == "__main__":
    for shape_name in SHAPES:
        sys.stdout.write(f"{ready(Path(sys.argv[1]), shape_name)}\n")
