"""The load probe: a model's packed forward pass against transformers' own, before it is handed out.

Rows of unequal length, two of them behind one prompt, go through our attention as one stream; each also goes through
the unchanged model alone. The stream is computed as in training, so a layer that draws random numbers fails as well.
Differences are relative to how much the outputs vary, so small weights hide nothing. The longest row goes past the
sliding windows of the configuration as far as a budget of arithmetic allows.

Legend: T tokens of a row, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whet.errors import ModelError
from whet.models.architecture import decoder_of, logit_rule, max_row_tokens, text_config
from whet.models.attention import ATTENTION, Tree, TreeLayout, attend, pick_backend
from whet.models.heads import is_scalar
from whet.models.quantize import is_quantised

EXACT, COARSE = 1e-3, 5e-2
"""Largest difference, as a share of the outputs' standard deviation: in float32 on a CPU, and below that precision."""
LEAST_TOKENS = 48
BUDGET = {"cpu": 5e10, "cuda": 5e12}
"""Multiplications that the longest row may cost in one pass: about a second."""


def check_forward(module: Any, name: str) -> None:
    """Leave the model with whet's attention, or raise `ModelError` where that would compute something else."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    device = module.get_input_embeddings().weight.device
    prompt, branches, alone = 5, (7, 3), (2, _longest(module), 11)
    trees = (Tree(prompt, branches), *(Tree(0, (length,)) for length in alone))
    layout = TreeLayout(trees, device, pick_backend(device))
    stream = _tokens(layout.tokens, module)
    rows = [range(prompt, prompt + branches[0]), range(prompt + branches[0], prompt + sum(branches))]
    shared, at = list(range(prompt)), trees[0].size
    places = [shared + list(row) for row in rows]
    for length in alone:
        places.append(list(range(at, at + length)))
        at += length
    with torch.no_grad():
        try:
            expected = [_own(module.eval(), stream[row]) for row in places]
            module.config._attn_implementation = ATTENTION
            trained, quiet = _packed(module.train(), stream, layout), _packed(module.eval(), stream, layout)
        except (ModelError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ModelError(f"{name}: {type(module).__name__} cannot run packed ({first_line(error)})") from error
    tolerance = EXACT if device.type == "cpu" and not is_quantised(module) else COARSE
    of_training, of_quiet = (
        max(_gap(hidden[row], own) for row, own in zip(places, expected, strict=True)) for hidden in (trained, quiet)
    )
    if not of_quiet < tolerance:
        raise ModelError(
            f"{name}: {type(module).__name__} computes something that whet's packed forward pass does not (its outputs "
            f"differ by {of_quiet:.2g} of their standard deviation on a probe), so it cannot be trained here"
        )
    if not of_training < tolerance:
        raise ModelError(
            f"{name}: {type(module).__name__} draws random numbers while it trains, which would make every ratio of "
            "probabilities noise; set what draws them (jitter, say) to 0 in its config.json"
        )


def first_line(error: BaseException) -> str:
    """An error of another library, short enough for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _own(module: Any, row_T: Tensor) -> Tensor:
    """What transformers computes for one row: logits, or hidden states for a scalar model."""
    if is_scalar(module):
        hidden_TD: Tensor = decoder_of(module)(input_ids=row_T[None], use_cache=False).last_hidden_state[0]
        return _unit(hidden_TD)
    logits_TV: Tensor = module(input_ids=row_T[None], use_cache=False).logits[0]
    return logits_TV.float()


def _packed(module: Any, stream_N: Tensor, layout: TreeLayout) -> Tensor:
    """The same for the whole stream, packed."""
    output = decoder_of(module)(
        input_ids=stream_N[None], position_ids=layout.positions_N[None], use_cache=False, layout=layout
    )
    hidden_ND: Tensor = output.last_hidden_state[0]
    if is_scalar(module):
        return _unit(hidden_ND)
    product_TV: Tensor = module.get_output_embeddings()(hidden_ND)
    rule = logit_rule(module.config)
    return rule(product_TV.float())


def _gap(packed: Tensor, own: Tensor) -> float:
    """Largest difference over the outputs' standard deviation; what all tokens have in common does not count."""
    spread = (own - own.mean()).std().clamp_min(torch.finfo(own.dtype).tiny)
    return float((packed - own).abs().max() / spread)


def _longest(module: Any) -> int:
    """Past the windows, if it can be had."""
    text, parameters = text_config(module.config), sum(p.numel() for p in module.parameters())
    windows = [value for key in ("sliding_window", "window_size") if isinstance(value := getattr(text, key, None), int)]
    wanted = max(LEAST_TOKENS, *(window + 8 for window in windows), 0)
    affordable = max(LEAST_TOKENS, int(BUDGET[module.device.type] / max(parameters, 1)))
    return min(wanted, affordable, max_row_tokens(module.config))


def _tokens(count: int, module: Any) -> Tensor:
    """Token ids all over the vocabulary, the same at each call."""
    weight: Tensor = module.get_input_embeddings().weight
    return (torch.arange(count, device=weight.device) * 7919 + 2) % weight.shape[0]


def _unit(hidden: Any) -> Tensor:
    """Hidden states scaled to unit size: what a scalar head sees, comparable between models."""
    unit: Tensor = F.rms_norm(hidden.float(), hidden.shape[-1:])
    return unit
