"""Preference losses: one number for each pair of answers, from what each is worth as a whole. Legend: P pairs.

Of an answer only the sum of its tokens' log-probabilities counts, under the policy and mostly under a reference, and
its length n. Here l = log p - log p_ref of an answer, h = l_chosen - l_rejected, and sigma is the logistic function.
Some losses are of *sums*, some of *means* over tokens: swapping them is a silent error, so every line says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, log1p
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Gt, Lt

from whet.formulas.constants import Beta, Doubt, NonNegative, Positive, SomeDoubt, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What a loss may look at: sums over the tokens of an answer, its stop token included."""

    chosen_P: Tensor
    """log p of the better answer, with gradient."""
    rejected_P: Tensor
    ref_chosen_P: Tensor
    """The same under the reference, a constant; NaN for losses that have none."""
    ref_rejected_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor
    chosen_step_P: Tensor
    """A statistic of the whole step (`PairFormula.statistic`), a constant; NaN for losses that have none."""
    rejected_step_P: Tensor

    @property
    def chosen_ratio_P(self) -> Tensor:
        """l of the better answer: log p - log p_ref."""
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        """l of the worse answer."""
        return self.rejected_P - self.ref_rejected_P

    @property
    def margin_P(self) -> Tensor:
        """h: by how much the policy prefers the better answer more than the reference does."""
        return self.chosen_ratio_P - self.rejected_ratio_P

    @property
    def chosen_mean_P(self) -> Tensor:
        """Mean log p of the better answer's tokens."""
        return self.chosen_P / self.chosen_length_P

    @property
    def rejected_mean_P(self) -> Tensor:
        """Mean log p of the worse answer's tokens."""
        return self.rejected_P / self.rejected_length_P

    @property
    def mean_margin_P(self) -> Tensor:
        """l_chosen / n_chosen - l_rejected / n_rejected."""
        return self.chosen_ratio_P / self.chosen_length_P - self.rejected_ratio_P / self.rejected_length_P


# ----------------------------------------------------------------------------- margins against a reference


def dpo(pairs: Pairs, *, beta: Beta = 0.1, smoothing: Doubt = 0.0) -> Tensor:
    """-(1-e) log sigma(beta h) - e log sigma(-beta h), of sums (DPO 2305.18290 eq. 7; e > 0: cDPO)."""
    return _logistic(beta * pairs.margin_P, smoothing)


def robust(pairs: Pairs, *, beta: Beta = 0.1, smoothing: SomeDoubt = 0.1) -> Tensor:
    """[-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e): unbiased if a share e of labels is flipped.

    Robust DPO (2403.00409), of sums.
    """
    z_P = beta * pairs.margin_P
    return (-(1 - smoothing) * log_sigmoid(z_P) + smoothing * log_sigmoid(-z_P)) / (1 - 2 * smoothing)


Average = Annotated[bool, "Means over tokens (as the authors say it is meant) or sums (as the paper prints it)."]


def ipo(pairs: Pairs, *, beta: Beta = 0.1, average: Average = True) -> Tensor:
    """(h - 1/(2 beta))^2 (IPO 2310.12036 eq. 17, where beta is tau); with `average` of means over tokens, else sums."""
    return ((pairs.mean_margin_P if average else pairs.margin_P) - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """max(0, 1 - beta h), of sums (SLiC's hinge on DPO's margin, RSO 2309.06657)."""
    return (1 - beta * pairs.margin_P).relu()


def dpo_norm(pairs: Pairs, *, beta: Beta = 5.0, smoothing: Doubt = 0.0) -> Tensor:
    """-log sigma(beta (l_chosen/n_chosen - l_rejected/n_rejected)): DPO of means (Tulu 3, 2411.15124)."""
    return _logistic(beta * pairs.mean_margin_P, smoothing)


def exo(pairs: Pairs, *, beta: Beta = 0.1, smoothing: SomeDoubt = 1e-3) -> Tensor:
    """KL(q || p), q = sigma(beta h), p = 1 - e, of sums: the other way round than DPO (EXO 2402.00856 eq. 16)."""
    z_P = beta * pairs.margin_P
    better_P = z_P.sigmoid() * (log_sigmoid(z_P) - log1p(-smoothing))
    return better_P + (-z_P).sigmoid() * (log_sigmoid(-z_P) - log(smoothing))


def discopop(pairs: Pairs, *, beta: Beta = 0.05, tau: Positive = 0.05) -> Tensor:
    """(1 - g) (-log sigma(z)) + g exp(-z) with z = beta h, g = sigma(z / tau), of sums (DiscoPOP 2406.08414)."""
    z_P = beta * pairs.margin_P
    gate_P = (z_P / tau).sigmoid()
    return -(1 - gate_P) * log_sigmoid(z_P) + gate_P * (-z_P).exp()


Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Alpha = Annotated[float, Gt(0), Lt(1), "For `alpha`: near 0 it is the reverse KL, near 1 the forward KL."]


def f_dpo(pairs: Pairs, *, beta: Beta = 0.1, divergence: Divergence = "js", alpha: Alpha = 0.5) -> Tensor:
    """-log sigma(beta (f'(u_chosen) - f'(u_rejected))), u = p / p_ref, of sums (f-DPO 2309.16240).

    f' is log u for the reverse KL (DPO itself), -1/u for the forward KL, log(2u / (1 + u)) for Jensen-Shannon and
    (1 - u^-alpha) / alpha for the alpha divergence. -l is held under 30 there, so that no exponential overflows.
    """
    slopes: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda l_P: l_P,
        "forward_kl": lambda l_P: -_grown(-l_P),
        "js": lambda l_P: l_P - softplus(l_P) + log(2),
        "alpha": lambda l_P: (1 - _grown(-alpha * l_P)) / alpha,
    }
    slope = slopes[divergence]
    return -log_sigmoid(beta * (slope(pairs.chosen_ratio_P) - slope(pairs.rejected_ratio_P)))


# ------------------------------------------------------------------- each answer against a fixed point


def apo_zero(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """(1 - sigma(beta l_chosen)) + sigma(beta l_rejected): one up, one down, of sums (APO-zero 2408.06266)."""
    return (-beta * pairs.chosen_ratio_P).sigmoid() + (beta * pairs.rejected_ratio_P).sigmoid()


def apo_down(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """sigma(beta l_chosen) + (1 - sigma(beta h)): both down, the worse one more, of sums (APO-down 2408.06266)."""
    return (beta * pairs.chosen_ratio_P).sigmoid() + (-beta * pairs.margin_P).sigmoid()


def sppo(pairs: Pairs, *, beta: Beta = 1e-3) -> Tensor:
    """(l_chosen - 1/(2 beta))^2 + (l_rejected + 1/(2 beta))^2, of sums (SPPO 2405.00675, beta = 1/eta)."""
    return (pairs.chosen_ratio_P - 0.5 / beta).square() + (pairs.rejected_ratio_P + 0.5 / beta).square()


def nca(pairs: Pairs, *, beta: Beta = 0.01) -> Tensor:
    """-log sigma(beta l_chosen) - (log sigma(-beta l_chosen) + log sigma(-beta l_rejected)) / 2 (NCA 2402.05369)."""
    chosen_P, rejected_P = beta * pairs.chosen_ratio_P, beta * pairs.rejected_ratio_P
    return -log_sigmoid(chosen_P) - (log_sigmoid(-chosen_P) + log_sigmoid(-rejected_P)) / 2


def bco(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """-log sigma(beta l_chosen - d) - log sigma(d - beta l_rejected), d the step's mean beta l (BCO 2404.04656)."""
    shifted_P = beta * (pairs.chosen_ratio_P - pairs.chosen_step_P)
    return -log_sigmoid(shifted_P) - log_sigmoid(-beta * (pairs.rejected_ratio_P - pairs.rejected_step_P))


def aot(pairs: Pairs, *, beta: Beta = 0.1, smoothing: Doubt = 0.0) -> Tensor:
    """DPO with both margins of the step sorted, the policy's and the reference's, of sums (AOT paired 2406.05882).

    Each margin is compared with the reference's of the same rank, which is `chosen_step_P`.
    """
    return _logistic(beta * (pairs.chosen_P - pairs.rejected_P - pairs.chosen_step_P), smoothing)


def aot_unpaired(pairs: Pairs, *, beta: Beta = 0.1, smoothing: Doubt = 0.0) -> Tensor:
    """DPO of the step's sorted l_chosen against its sorted l_rejected, of sums (AOT unpaired 2406.05882).

    An answer's opposite in rank is its step constant. Both sides carry gradient; the value is counted once.
    """
    above_P = _logistic(beta * (pairs.chosen_ratio_P - pairs.chosen_step_P), smoothing)
    below_P = _logistic(beta * (pairs.rejected_step_P - pairs.rejected_ratio_P), smoothing)
    return above_P + below_P - below_P.detach()


# -------------------------------------------------------------------------------- without a reference


def slic(pairs: Pairs, *, delta: Positive = 1.0) -> Tensor:
    """max(0, delta - log p_chosen + log p_rejected), of sums, without a reference (SLiC-HF 2305.10425)."""
    return (delta - pairs.chosen_P + pairs.rejected_P).relu()


def simpo(pairs: Pairs, *, beta: Beta = 2.0, gamma: NonNegative = 1.0, smoothing: Doubt = 0.0) -> Tensor:
    """-log sigma(beta mean log p_chosen - beta mean log p_rejected - gamma), no reference (SimPO 2405.14734 eq. 6).

    gamma stands outside beta; papers tabulate gamma / beta.
    """
    return _logistic(beta * (pairs.chosen_mean_P - pairs.rejected_mean_P) - gamma, smoothing)


def contrast(pairs: Pairs, *, beta: Beta = 0.1, smoothing: Doubt = 0.0) -> Tensor:
    """-log sigma(beta (log p_chosen - log p_rejected)), of sums, without a reference (CPO 2401.08417)."""
    return _logistic(beta * (pairs.chosen_P - pairs.rejected_P), smoothing)


def odds_ratio(pairs: Pairs) -> Tensor:
    """-log sigma(log odds_chosen - log odds_rejected), odds = P / (1 - P), log P the mean log p (ORPO 2403.07691)."""
    return -log_sigmoid(log_odds(pairs.chosen_mean_P) - log_odds(pairs.rejected_mean_P))


def nll(pairs: Pairs) -> Tensor:
    """-mean log p of the better answer's tokens: what keeps it likely (ORPO, CPO, iterative RPO 2404.19733)."""
    return -pairs.chosen_mean_P


def log_sigmoid(z: Tensor) -> Tensor:
    """log sigma(z), exact on both ends."""
    return torch.nn.functional.logsigmoid(z)


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z))."""
    return torch.nn.functional.softplus(z)


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p) for log p < 0, exact on both ends; a certainty counts as 1 - 1e-6."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.where(logp > -log(2), (-logp.expm1()).log(), (-logp.exp()).log1p())


# ------------------------------------------------------------------------------------- single answers


Desirable = Annotated[
    float,
    Gt(0),
    "Weight of good answers; desirable x good rows / (undesirable x bad rows) should lie between 1 and 3/2.",
]


def kto(
    ratio_R: Tensor,
    good_R: Tensor,
    baseline_R: Tensor,
    *,
    beta: Beta = 0.1,
    desirable: Desirable = 1.0,
    undesirable: Positive = 1.0,
) -> Tensor:
    """Good: desirable (1 - sigma(beta (l - z))); bad: undesirable (1 - sigma(beta (z - l))) (KTO 2402.01306 eq. 8).

    R answers; l of sums; z = max(0, mean l of the step's mismatched answers), a constant.
    """
    value_R = beta * (ratio_R - baseline_R)
    return torch.where(good_R > 0, desirable * (-value_R).sigmoid(), undesirable * value_R.sigmoid())


# ------------------------------------------------------------------------------------------- tables


def _bco_statistic(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The mean l of all answers."""
    middle = torch.cat([pairs.chosen_ratio_P, pairs.rejected_ratio_P]).mean()
    return middle.expand_as(pairs.chosen_ratio_P), middle.expand_as(pairs.rejected_ratio_P)


def _aot_statistic(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """For each margin the reference's of the same rank; seen from the worse answer both have the other sign."""
    matched_P = _matched(pairs.chosen_P - pairs.rejected_P, pairs.ref_chosen_P - pairs.ref_rejected_P)
    return matched_P, -matched_P


def _aot_unpaired_statistic(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """For each better answer the worse one of the same rank, and the other way round."""
    chosen_P, rejected_P = pairs.chosen_ratio_P, pairs.rejected_ratio_P
    return _matched(chosen_P, rejected_P), _matched(rejected_P, chosen_P)


def _matched(left_P: Tensor, right_P: Tensor) -> Tensor:
    """For each of `left` the value of `right` that has the same rank."""
    return right_P.sort().values[left_P.argsort(stable=True).argsort()]


Statistic: TypeAlias = "Callable[[Pairs], tuple[Tensor, Tensor]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFormula:
    """A loss of pairs, and what must be known of it before it is called."""

    loss: Callable[..., Tensor]
    reference: bool = True
    """Whether a reference enters."""
    means: bool = False
    """Of means over tokens, not of sums; `ipo` may be either."""
    statistic: Statistic | None = None
    """What it has to know of the whole step, for the better and the worse answer of each pair. It is taken once, before
    the step is split, without gradient; so no split can change it."""


FORMULAS = (
    PairFormula(loss=dpo),
    PairFormula(loss=robust),
    PairFormula(loss=ipo),
    PairFormula(loss=hinge),
    PairFormula(loss=dpo_norm, means=True),
    PairFormula(loss=exo),
    PairFormula(loss=discopop),
    PairFormula(loss=f_dpo),
    PairFormula(loss=apo_zero),
    PairFormula(loss=apo_down),
    PairFormula(loss=sppo),
    PairFormula(loss=nca),
    PairFormula(loss=bco, statistic=_bco_statistic),
    PairFormula(loss=aot, statistic=_aot_statistic),
    PairFormula(loss=aot_unpaired, statistic=_aot_unpaired_statistic),
    PairFormula(loss=slic, reference=False),
    PairFormula(loss=simpo, reference=False, means=True),
    PairFormula(loss=contrast, reference=False),
    PairFormula(loss=odds_ratio, reference=False, means=True),
    PairFormula(loss=nll, reference=False, means=True),
)
LOSSES: dict[str, PairFormula] = {formula.loss.__name__: formula for formula in FORMULAS}
"""By the name that recipes use, which is the function's."""


def _logistic(z_P: Tensor, smoothing: float) -> Tensor:
    """-(1-e) log sigma(z) - e log sigma(-z)."""
    if smoothing == 0:
        return -log_sigmoid(z_P)
    return -(1 - smoothing) * log_sigmoid(z_P) - smoothing * log_sigmoid(-z_P)


def _grown(x: Tensor) -> Tensor:
    return x.clamp(max=30).exp()
