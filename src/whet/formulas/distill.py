"""Divergences of a student from its teacher at each token, over what the teacher finds likeliest.

Kept are the teacher's K likeliest tokens; all others are one more: the *tail*, with the probability that is left. What
is measured between such coarser distributions is never more than the full divergence, 0 where they are equal, and with
K = V the full one. Renormalising over the K would be another objective, one that says nothing of the tail.

No gradient is that of sampling: on a student's own answers the prefix is as it is (GKD 2306.13649, section 3.1).

Legend: T tokens, K the teacher's likeliest, B = K + 1 with the tail.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from whet.formulas.constants import torch

if TYPE_CHECKING:
    from torch import Tensor


def with_tail(logp_TK: Tensor) -> Tensor:
    """log p of the K tokens and log(1 - sum p) of all others, (T, B); a tail below rounding is held there."""
    most = 1 - 8 * torch.finfo(logp_TK.dtype).eps
    tail_T = torch.log1p(-logp_TK.exp().sum(-1).clamp(max=most))
    return torch.cat([logp_TK, tail_T[:, None]], -1)


def forward_kl(student_TB: Tensor, teacher_TB: Tensor) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher may say (Hinton 1503.02531; GKD 2306.13649)."""
    return _kl(teacher_TB, student_TB)


def reverse_kl(student_TB: Tensor, teacher_TB: Tensor) -> Tensor:
    """KL(student || teacher): the student keeps to what the teacher would say (MiniLLM 2306.08543; GKD 2306.13649)."""
    return _kl(student_TB, teacher_TB)


def jsd(
    student_TB: Tensor,
    teacher_TB: Tensor,
    *,
    beta: Annotated[float, Gt(0), Lt(1), "Share of the teacher in the mixture; near 0 like forward_kl."] = 0.5,
) -> Tensor:
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S, the generalised JSD (GKD 2306.13649)."""
    mixture_TB = torch.logaddexp(teacher_TB + log(beta), student_TB + log(1 - beta))
    return beta * _kl(teacher_TB, mixture_TB) + (1 - beta) * _kl(student_TB, mixture_TB)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def _kl(left_TB: Tensor, right_TB: Tensor) -> Tensor:
    """KL(left || right) of log-probabilities."""
    return (left_TB.exp() * (left_TB - right_TB)).sum(-1)
