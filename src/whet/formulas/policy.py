"""The policy-gradient loss: ratios, surrogates, KL estimates and controllers of coefficients.

From each token's log(p / p_old) a *level* makes the ratio that a *surrogate* uses, still in logarithms. A surrogate
takes the `Tokens` of a micro-batch and its own constants. Where a form stops gradients, a second function says at which
tokens; `SURROGATES` holds the two together.

Legend: T trained tokens of a micro-batch, R its rows. `row_T` says whose token each is; rows are never split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

from annotated_types import Gt, Le

from whet.formulas.constants import Positive, torch

if TYPE_CHECKING:
    from torch import Tensor

# ----------------------------------------------------------------------------------------- ratios


def token(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """Each token's own ratio (PPO 1707.06347, GRPO 2402.03300)."""
    return log_T


def sequence_product(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The sum over the row: the ratio of whole answers (DeepSeek-R1 2501.12948 eq. 1 as printed)."""
    return _sum(log_T, row_T, rows)[row_T]


def sequence_mean(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The mean over the row: the geometric mean of its tokens' ratios (GSPO 2507.18071 eq. 7)."""
    return (_sum(log_T, row_T, rows) / _sum(torch.ones_like(log_T), row_T, rows))[row_T]


def sequence_mean_token(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The value of `sequence_mean` with the gradient of each token's own (GSPO-token 2507.18071 eq. 13-14)."""
    return sequence_mean(log_T, row_T, rows).detach() + log_T - log_T.detach()


def none(log_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """A ratio of exactly 1 whose gradient is log p's: with it, r A is REINFORCE (Williams 1992)."""
    return log_T - log_T.detach()


Level: TypeAlias = "Callable[[Tensor, Tensor, int], Tensor]"
LEVELS: dict[str, Level] = {
    "none": none,
    "token": token,
    "sequence_mean": sequence_mean,
    "sequence_mean_token": sequence_mean_token,
    "sequence_product": sequence_product,
}


def truncate(log_weight_T: Tensor, *, low: float, high: float) -> Tensor:
    """min(w, high), a constant: truncated importance sampling (Espeholt 2018; TIS, Yao 2025). `low` is not used."""
    return log_weight_T.detach().exp().clamp(max=high)


def mask(log_weight_T: Tensor, *, low: float, high: float) -> Tensor:
    """w where low <= w <= high, else 0, a constant (IcePop; masked importance sampling)."""
    weight_T = log_weight_T.detach().exp()
    return weight_T * ((weight_T >= low) & (weight_T <= high))


CORRECTIONS: dict[str, Callable[..., Tensor]] = {"truncate": truncate, "mask": mask}
"""p(trainer) / p(sampler) as a weight of the loss; an estimator, so denominators stay as they are."""


def _sum(value_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """The sums of rows, (R,)."""
    return value_T.new_zeros(rows).index_add(0, row_T, value_T)


# ------------------------------------------------------------------------------------- surrogates


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a surrogate may look at."""

    logp_T: Tensor
    """log p under the policy, with gradient."""
    old_logp_T: Tensor
    log_ratio_T: Tensor
    """log(p / p_old) at the level that was chosen (`LEVELS`), with gradient."""
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
    """-r A; with a ratio of 1 (`none`) its gradient is -A grad log p (Williams 1992)."""
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


# --------------------------------------------------------------------------------------------- KL
# Estimates of KL(policy || reference) from sampled tokens (Schulman 2020). With d = logp - ref_logp, and what d is of
# sampled from the policy, k1 and k3 are unbiased in value. As a *loss* k2 has the KL's gradient on-policy, k3 that of
# the forward KL (it agrees near the reference), and k1 none at all.
#
# What d is of matters. Of a whole answer (sums over its tokens) all this holds for the KL of answers. Of a token it
# holds for the KL of the next token with the prefix as it is: the sum over tokens is the answers' KL in value, but as a
# loss it lacks what a token does to the KL of those that follow. k1 in the *reward* of tokens, with returns over the
# whole answer, has the gradient of the answers' KL.


def k1(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """d; unbiased, may be negative. Useless as a loss: its expected gradient is zero, of tokens and of answers."""
    return logp_T - ref_logp_T


def k2(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor | None = None) -> Tensor:
    """d^2 / 2; biased in value; on-policy its gradient is that of the KL of what d is of (a token or an answer)."""
    return (logp_T - ref_logp_T).square() / 2


def k3(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor | None = None) -> Tensor:
    """exp(-d) - 1 + d; never negative (the form in GRPO, 2402.03300 eq. 4)."""
    d_T = logp_T - ref_logp_T
    return (-d_T).exp() - 1 + d_T


def k3_unbiased(logp_T: Tensor, ref_logp_T: Tensor, log_ratio_T: Tensor) -> Tensor:
    """r k3 with r = p / p_old in the gradient: KL's own, off-policy too, where r and d are of the same (2512.02556)."""
    return log_ratio_T.exp() * k3(logp_T, ref_logp_T)


KL_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k2": k2,
    "k3": k3,
    "k3_unbiased": k3_unbiased,
}
"""The estimators that may be a loss, of (logp, ref_logp, log ratio to the sampling policy, which k2 and k3 ignore)."""


# ------------------------------------------------------------------------------------ controllers
# The last two: reward under a constraint, max over policies, min over l >= 0 of J_R - l (J_C - d) (Safe RLHF
# 2310.12773). The multiplier l is a controller's word (Stooke, Achiam, Abbeel 2020, 2007.03964, without the
# derivative): J are means over the answers of a step, d is the limit, I the integral in units of l.


def adapt(coefficient: float, kl: float, *, target: float, answers: int, horizon: int) -> float:
    """The next coefficient: b (1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon) (Ziegler 1909.08593, 2.2).

    `kl` and `target` are nats for each answer (sums over its tokens), `answers` those of the step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)


def steer(coefficient: float, entropy: float, *, target: float, rate: float) -> float:
    """The next coefficient of the entropy bonus: `rate` up below the target, down above (Skywork-OR1 2505.22312)."""
    return max(0.0, coefficient + (rate if entropy < target else -rate))


def charged(reward: float, cost: float, *, multiplier: float) -> float:
    """(R - l C) / (1 + l): what any advantage that is linear in the reward makes the combined one of Safe RLHF."""
    return (reward - multiplier * cost) / (1 + multiplier)


def controlled(integral: float, cost: float, *, limit: float, gain: float, most: float) -> float:
    """I + K (J_C - d), held between 0 and `most`: with K_I the next integral, with K_P on top of that l."""
    return min(max(integral + gain * (cost - limit), 0.0), most)
