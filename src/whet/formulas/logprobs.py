"""Log-probabilities of given tokens, in chunks that never hold tokens x vocabulary.

Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Most logits held at once (64 MiB in float32)."""


def token_logp(logits_TV: Tensor, target_T: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[target], computed in float32 or wider."""
    logits_TV = _widen(logits_TV) / temperature
    return logits_TV.gather(-1, target_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)


def entropy(logits_TV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum p log p of softmax(logits / temperature), in nats, computed in float32 or wider."""
    logp_TV = (_widen(logits_TV) / temperature).log_softmax(-1)
    return -(logp_TV.exp() * logp_TV).sum(-1)


def chunked_logp(
    hidden_TD: Tensor,
    target_T: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """(logp_T, entropy_T or None) of `head(hidden)`; the logits of one chunk at a time, recomputed in backward.

    The entropy is a measurement without gradient, unless `entropy_gradient` makes it part of a loss. The result
    does not depend on `chunk_elements`.
    """

    def one_chunk(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        seen = logits if entropy_gradient else logits.detach()
        measured = entropy(seen, temperature=temperature) if with_entropy else logits.new_zeros(0)
        return token_logp(logits, target, temperature=temperature), measured

    size = max(1, chunk_elements // vocabulary)
    pieces = list(zip(torch.split(hidden_TD, size), torch.split(target_T, size), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        results = [one_chunk(*piece) for piece in pieces]
    else:
        results = [checkpoint(one_chunk, *piece, use_reentrant=False) for piece in pieces]
    logp_T = torch.cat([logp for logp, _ in results])
    return logp_T, torch.cat([measured for _, measured in results]) if with_entropy else None


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
