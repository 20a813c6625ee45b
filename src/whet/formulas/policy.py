"""Policy-gradient surrogates: one number for each sampled token. Legend: T trained tokens of whole rows.

Each takes the `Tokens` of a micro-batch and its own constants. Where a form stops gradients, a second function says
at which tokens; `SURROGATES` holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from annotated_types import Gt, Le

from whet.formulas.constants import Positive, torch
from whet.formulas.ratios import sequence_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a surrogate may look at."""

    logp_T: Tensor
    """log p under the policy, with gradient."""
    old_logp_T: Tensor
    log_ratio_T: Tensor
    """log(p / p_old) at the level that was chosen (`formulas.ratios`), with gradient."""
    advantage_T: Tensor
    row_T: Tensor
    """Which row each token belongs to."""
    rows: int


Dual = Annotated[
    float | None, Gt(1), "Where the advantage is negative, the ratio counts for no more than this (dual clip)."
]
Nats = Annotated[float, Gt(0), "In nats."]
Cap = Annotated[float, Gt(1), "The largest ratio itself (not 1 + something)."]
Fall = Annotated[float, Gt(0), Le(1), "Largest fall of a token's probability where its advantage is negative."]
Rise = Annotated[float, Gt(0), Le(1), "Largest rise of a token's probability where its advantage is positive."]


def unclipped(tokens: Tokens) -> Tensor:
    """-r A; with a ratio of 1 (`ratios.none`) its gradient is -A grad log p (Williams 1992)."""
    return -tokens.log_ratio_T.exp() * tokens.advantage_T


def ppo(tokens: Tokens, *, low: Positive = 0.2, high: Positive = 0.2, dual: Dual = None) -> Tensor:
    """-min(r A, clip(r, 1-low, 1+high) A) (PPO 1707.06347 eq. 7; DAPO 2503.14476 eq. 10).

    With `dual`, at most -dual A where A < 0 (dual-clip PPO 1912.09729 eq. 5).
    """
    ratio_T, advantage_T = tokens.log_ratio_T.exp(), tokens.advantage_T
    loss_T = -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - low, 1 + high) * advantage_T)
    if dual is None:
        return loss_T
    return torch.where(advantage_T < 0, torch.minimum(loss_T, -dual * advantage_T), loss_T)


def ppo_stops(tokens: Tokens, *, low: float, high: float, dual: float | None) -> Tensor:
    """Where r < 1-low and A < 0, or r > 1+high and A > 0; with `dual` also where r > dual and A < 0."""
    ratio_T, negative_T = tokens.log_ratio_T.exp(), tokens.advantage_T < 0
    stopped_T = ((ratio_T < 1 - low) & negative_T) | ((ratio_T > 1 + high) & (tokens.advantage_T > 0))
    return stopped_T if dual is None else stopped_T | ((ratio_T > dual) & negative_T)


def geometric(tokens: Tokens, *, low: Nats = 0.4, high: Nats = 0.4) -> Tensor:
    """-A exp(mean over the row of clipped log r) (GMPO 2507.20673): at most high if A > 0, at least -low if A < 0."""
    log_T = tokens.log_ratio_T
    log_T = torch.where(tokens.advantage_T > 0, log_T.clamp(max=high), log_T.clamp(min=-low))
    return -tokens.advantage_T * sequence_mean(log_T, tokens.row_T, tokens.rows).exp()


def geometric_stops(tokens: Tokens, *, low: float, high: float) -> Tensor:
    """Where the log ratio is over its bound on the side to which A points."""
    log_T, advantage_T = tokens.log_ratio_T, tokens.advantage_T
    return ((log_T > high) & (advantage_T > 0)) | ((log_T < -low) & (advantage_T < 0))


def cispo(tokens: Tokens, *, cap: Cap = 5.0) -> Tensor:
    """-sg(min(r, cap)) A log p: truncated, never silenced (MiniMax-M1 2506.13585 eq. 4-5)."""
    return -tokens.log_ratio_T.detach().exp().clamp(max=cap) * tokens.advantage_T * tokens.logp_T


def cispo_stops(tokens: Tokens, *, cap: float) -> Tensor:
    """Where the ratio is truncated."""
    return tokens.log_ratio_T.exp() > cap


def sapo(tokens: Tokens, *, positive: Positive = 1.0, negative: Positive = 1.05) -> Tensor:
    """-A 4/t sigmoid(t (r - 1)), t = positive where A > 0, else negative (SAPO 2511.20347)."""
    advantage_T = tokens.advantage_T
    steepness_T = torch.where(advantage_T > 0, advantage_T.new_tensor(positive), advantage_T.new_tensor(negative))
    return -advantage_T * 4 / steepness_T * (steepness_T * (tokens.log_ratio_T.exp() - 1)).sigmoid()


def dppo(tokens: Tokens, *, low: Fall = 0.15, high: Rise = 0.15, cap: Cap = 20.0) -> Tensor:
    """-sg(min(r, cap)) A log p, and 0 where `dppo_stops` (DPPO 2602.04879, binary total variation)."""
    keep_T = ~dppo_stops(tokens, low=low, high=high, cap=cap)
    return cispo(tokens, cap=cap) * keep_T


def dppo_stops(tokens: Tokens, *, low: float, high: float, cap: float) -> Tensor:
    """Where p - p_old > high and A > 0, or p - p_old < -low and A < 0."""
    moved_T = tokens.logp_T.detach().exp() - tokens.old_logp_T.exp()
    return ((moved_T > high) & (tokens.advantage_T > 0)) | ((moved_T < -low) & (tokens.advantage_T < 0))


def quadratic(tokens: Tokens, *, beta: Positive = 1.0) -> Tensor:
    """-(A log p - beta/2 (log r)^2) (DRO 2405.19107; Kimi k1.5 2501.12599)."""
    return -(tokens.advantage_T * tokens.logp_T - beta / 2 * tokens.log_ratio_T.square())


class Surrogate(NamedTuple):
    """A loss, and where it stops (or truncates) a gradient."""

    loss: Callable[..., Tensor]
    stops: Callable[..., Tensor]
    of_tokens: bool = False
    """Whether it is defined for the ratio of tokens only."""


def nowhere(tokens: Tokens, **_: float) -> Tensor:
    """False everywhere: nothing is stopped."""
    return torch.zeros_like(tokens.advantage_T, dtype=torch.bool)


SURROGATES: dict[str, Surrogate] = {
    "ppo": Surrogate(ppo, ppo_stops),
    "none": Surrogate(unclipped, nowhere),
    "geometric": Surrogate(geometric, geometric_stops, of_tokens=True),
    "cispo": Surrogate(cispo, cispo_stops, of_tokens=True),
    "sapo": Surrogate(sapo, nowhere),
    "dppo": Surrogate(dppo, dppo_stops, of_tokens=True),
    "quadratic": Surrogate(quadratic, nowhere, of_tokens=True),
}


def covariance(logp_T: Tensor, advantage_T: Tensor) -> Tensor:
    """(A - mean A) (log p - mean log p): its mean over the step is how fast entropy falls (2505.22617 eq. 8).

    T are the tokens of the whole step; both are constants.
    """
    return (advantage_T - advantage_T.mean()) * (logp_T - logp_T.mean())


def steer(coefficient: float, entropy: float, *, target: float, rate: float) -> float:
    """The next coefficient of the entropy bonus: `rate` up below the target, down above (Skywork-OR1 2505.22312)."""
    return max(0.0, coefficient + (rate if entropy < target else -rate))
