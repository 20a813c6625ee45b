"""Chat templates in the manner of the common families, short enough to read, and a byte-level tokenizer for them."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "[gMASK]",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|START|>",
    "<|RESPONSE|>",
    "<|END|>",
)
CALLS = "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{%- endfor %}"
CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content }}" + CALLS + "<|im_end|>{{ '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{%- endif %}"
)
GPT_OSS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.reasoning_content and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{%- endif %}"
    "{%- for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|channel|>commentary<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{%- endfor %}"
    "{%- if not m.tool_calls %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{%- if loop.last %}<|return|>{%- else %}<|end|>{%- endif %}{%- endif %}"
    "{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": (
        "{{- bos_token }}{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
        "{{- m.content | trim }}" + CALLS + "<|eot_id|>{%- endfor %}"
        "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{%- endif %}"
    ),
    "Mistral": (
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{%- elif m.role == 'system' %}[SYSTEM]{{ m.content }}[/SYSTEM]"
        "{%- else %} {{ m.content }}" + CALLS + "{{ eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %} {% endif %}"
    ),
    "Zephyr": (
        "{%- for m in messages %}{{ '<' + m.role + '>\n' + m.content }}" + CALLS + "{{ eos_token + '\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{ '<assistant>\n' }}{%- endif %}"
    ),
    "Gemma": (
        "{{- bos_token }}{%- for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
        "{{ '\n' + m.content | trim }}" + CALLS + "<end_of_turn>{{ '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{%- endif %}"
    ),
    "Phi-3": (
        "{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}" + CALLS + "<|end|>{{ '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{%- else %}{{ eos_token }}{%- endif %}"
    ),
    "OLMo": (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '[assistant]\n' + m.content }}" + CALLS + ""
        "{%- if loop.last %}{{ eos_token }}{%- else %}{{ '\n' }}{%- endif %}"
        "{%- else %}{{ '[' + m.role + ']\n' + m.content + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '[assistant]\n' }}{%- endif %}"
    ),
    "GLM-4": (
        "[gMASK]{%- for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>{{ '\n' + m.content }}"
        + CALLS
        + "{%- endfor %}{%- if add_generation_prompt %}<|assistant|>{{ '\n' }}{%- endif %}"
    ),
    "gpt-oss": GPT_OSS,
    "Command": (
        "{%- for m in messages %}<|START|>{{ m.role }}{%- if m.role == 'assistant' %}<|RESPONSE|>{%- endif %}"
        "{{ m.content }}" + CALLS + "{%- if m.role == 'assistant' %}<|RESPONSE|>{%- endif %}<|END|>{%- endfor %}"
        "{%- if add_generation_prompt %}<|START|>assistant<|RESPONSE|>{%- endif %}"
    ),
    "Qwen 3": (
        "{%- set ns = namespace(last=-1) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
        "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
        "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
        "{{- m.content }}" + CALLS + "<|im_end|>{{ '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
}
EOS = {"GLM-4": ("</s>", "<|user|>", "<|observation|>"), "gpt-oss": ("<|return|>", "<|call|>"), "Phi-3": ("<|end|>",)}
"""What their models' generation configs call ends of text, beside the tokenizer's own."""


def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with all markup as special tokens, and this template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATES[name]
    return fast
