"""The policy loss: a ratio, a surrogate and the terms that a recipe adds, each a function with its constants bound.

It is a value (frozen, picklable) and linear in the weights; every statistic over the step is already a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from whet.algorithms.own_loss import own_loss
from whet.config.policy import PolicyConfig
from whet.config.policy_terms import ClipSection, OwnClip
from whet.formulas import policy as formulas
from whet.formulas.constants import Bound
from whet.formulas.policy import SURROGATES, Level, Tokens
from whet.models.marks import ROLES
from whet.training.base import Batch, Need, Objective, Outputs, Tally

OfTokens = Callable[[Tokens], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Weighs the loss by a function of log(p_trainer / p_sampler), at the level of tokens or answers."""

    weight: Callable[[Tensor], Tensor]
    level: Level = formulas.token


@dataclass(frozen=True, slots=True, kw_only=True)
class KLPenalty:
    """coefficient x estimate(log p, log p_ref, log ratio), of tokens or of whole answers."""

    estimate: Callable[[Tensor, Tensor, Tensor], Tensor]
    coefficient: float
    of_answers: bool = False

    def __call__(self, tokens: Tokens, ref_logp_T: Tensor) -> Tensor:
        """The term of each token, or at each token that of its whole answer."""
        logp_T, old_T = tokens.logp_T, tokens.old_logp_T
        if self.of_answers:
            logp_T, ref_logp_T, old_T = (
                formulas.sequence_product(each, tokens.row_T, tokens.rows) for each in (logp_T, ref_logp_T, old_T)
            )
        return self.coefficient * self.estimate(logp_T, ref_logp_T, logp_T - old_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss(Objective):
    """surrogate x correction + KL - entropy bonus + KL-Cov + NLL of right answers, for each token.

    Columns: `advantage`, `sampler_logp`, and where a term needs them `old_logp`, `ref_logp`, `kl_cov`, `positive`.
    Without `old_logp` the policy that is being trained is the one that sampled, and its ratio is 1.
    """

    surrogate: OfTokens
    stops: OfTokens
    """Where the surrogate stops (or truncates) a gradient."""
    level: Level = formulas.token
    against_sampler: bool = False
    """The ratio's denominator is what the sampler reported, not the trainer's own log-probability at rollout."""
    temperature: float = 1.0
    correction: Correction | None = None
    kl: KLPenalty | None = None
    entropy: float = 0.0
    """Coefficients of the entropy bonus, of KL-Cov, of the NLL of right answers; 0: the term is not there."""
    kl_cov: float = 0.0
    positive_nll: float = 0.0
    far: float = inf
    """Nats beyond which sampler and trainer are far apart on a token; the share of such tokens is a metric."""

    @property
    def needs(self) -> frozenset[Need]:
        """Entropy, as a metric or as a term of the loss."""
        return frozenset({"entropy", "entropy_grad"} if self.entropy else {"entropy"})

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and per-token metrics."""
        columns, rows = batch.columns, (batch.row_T, batch.rows)
        logp_T, entropy_T = outputs.logp_T, outputs.entropy_T
        assert entropy_T is not None, "it was asked for"
        now_T = logp_T.detach()
        trainer_T = columns["old_logp"] if "old_logp" in columns else now_T
        old_T = columns["sampler_logp"] if self.against_sampler else trainer_T
        tokens = Tokens(
            logp_T=logp_T,
            old_logp_T=old_T,
            log_ratio_T=self.level(logp_T - old_T, *rows),
            advantage_T=columns["advantage"],
            row_T=batch.row_T,
            rows=batch.rows,
        )
        gap_T = (trainer_T - columns["sampler_logp"]).abs()
        loss_T, stopped_T = self.surrogate(tokens), self.stops(tokens).to(logp_T.dtype)
        measured = {
            "clip_ratio/low_mean": stopped_T * (tokens.advantage_T < 0),
            "clip_ratio/high_mean": stopped_T * (tokens.advantage_T > 0),
            "entropy": entropy_T.detach(),
            "sampling/logp_gap_mean": gap_T,
            "sampling/logp_gap_far": (gap_T > self.far).to(logp_T.dtype),
            "ratio/log_mean": (now_T - old_T).abs(),
        }
        if self.correction is not None:
            log_weight_T = self.correction.level(trainer_T - columns["sampler_logp"], *rows)
            weight_T = self.correction.weight(log_weight_T)
            loss_T = weight_T * loss_T
            measured["correction/weight_mean"] = weight_T
            measured["correction/changed_mean"] = (weight_T != log_weight_T.exp()).to(logp_T.dtype)
        if "ref_logp" in columns:
            measured["kl"] = formulas.k3(now_T, columns["ref_logp"])
        if "teacher_logp" in columns:
            measured["teacher/reverse_kl"] = now_T - columns["teacher_logp"]
        if self.kl is not None:
            loss_T = loss_T + self.kl(tokens, columns["ref_logp"])
        if self.entropy:
            loss_T = loss_T - self.entropy * entropy_T
        if self.kl_cov:
            loss_T = loss_T + self.kl_cov * columns["kl_cov"] * (logp_T - old_T).abs()
        if self.positive_nll:
            loss_T = loss_T - self.positive_nll * columns["positive"] * logp_T
        count = batch.weight_T.new_tensor(len(logp_T))
        tallies = {name: Tally(total=value.sum(), weight=count) for name, value in measured.items()}
        for number, role in enumerate(ROLES) if "role" in columns else ():
            of_T = (columns["role"] == number).to(logp_T.dtype)
            tallies[f"roles/{role}/share"] = Tally(total=of_T.sum(), weight=count)
            tallies[f"roles/{role}/entropy"] = Tally(total=(entropy_T.detach() * of_T).sum(), weight=of_T.sum())
        if "lag" in columns:  # of tokens of older weights it would be the policy's own move
            same_T = (columns["lag"] == 0).to(logp_T.dtype)
            for name in ("sampling/logp_gap_mean", "sampling/logp_gap_far"):
                tallies[name] = Tally(total=(measured[name] * same_T).sum(), weight=same_T.sum())
        tallies["loss"] = Tally(total=(batch.weight_T * loss_T.detach()).sum(), weight=torch.ones_like(count))
        return (batch.weight_T * loss_T).sum(), tallies


def _surrogate(clip: ClipSection) -> tuple[OfTokens, OfTokens]:
    """The loss of each token, and where it stops a gradient; one's own is taken to stop none."""
    if isinstance(clip, OwnClip):
        return own_loss(clip), formulas.nowhere
    surrogate, constants = SURROGATES[clip.kind], clip.model_dump(exclude={"kind"})
    return Bound(surrogate.loss, **constants), Bound(surrogate.stops, **constants)


def policy_loss(
    config: PolicyConfig,
    *,
    temperature: float = 1.0,
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    far: float = inf,
) -> PolicyLoss:
    """The loss of a point in the space of policy gradients, with the coefficients where their controllers stand."""
    surrogate, stops = _surrogate(config.clip)
    correction = config.correction
    return PolicyLoss(
        surrogate=surrogate,
        stops=stops,
        level=formulas.LEVELS[config.ratio.level],
        against_sampler=config.ratio.denominator == "sampler",
        temperature=temperature,
        correction=None
        if correction is None
        else Correction(
            weight=Bound(formulas.CORRECTIONS[correction.kind], low=correction.low, high=correction.high),
            level=formulas.LEVELS[correction.level],
        ),
        kl=None
        if config.kl.place != "loss"
        else KLPenalty(
            estimate=formulas.KL_LOSSES[config.kl.estimator],
            coefficient=kl_coefficient,
            of_answers=config.kl.level == "sequence",
        ),
        entropy=entropy_coefficient,
        kl_cov=0.0 if config.kl_cov is None else config.kl_cov.coefficient,
        positive_nll=0.0 if config.positive_nll is None else config.positive_nll.coefficient,
        far=far,
    )
