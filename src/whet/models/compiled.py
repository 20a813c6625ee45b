"""Decoder layers compiled by torch: norms, rotary embeddings and gates become one kernel each.

What attention does depends on the lengths in a micro-batch (how many buckets, of what shapes), which a compiler would
have to follow anew each time. So a layer is compiled in pieces around it (its own frame and that of its attention
module are each cut in two), for any number of tokens, and attention is called between them as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import torch

from whet.errors import ModelError
from whet.models.architecture import decoder_of
from whet.models.attention import attend

APART = "whet-apart"
"""Attention that a compiler does not look into, under a name of its own: other models are loaded under theirs."""


def compile_layers(module: Any, device: torch.device) -> None:
    """Compile the decoder's layers in place, at their first call. `ModelError` where there is no compiler to do it."""
    from transformers import AttentionInterface

    compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ModelError(
            f"train.compile: needs a C++ compiler on a CPU, and there is no {compiler}; install it, or leave it out"
        )
    AttentionInterface.register(APART, torch.compiler.disable(attend))
    module.config._attn_implementation = APART
    for layer in decoder_of(module).layers:
        layer.compile(dynamic=True)
