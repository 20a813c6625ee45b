"""The policy objective: a ratio, a surrogate and whatever terms the recipe adds, all chosen from tables.

It is a value (frozen, picklable) and linear in the weights; every statistic over the step is already a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.config import PolicyConfig
from whet.formulas import kl as divergence
from whet.formulas.policy import FORMS, Tokens
from whet.formulas.ratios import CORRECTIONS, LEVELS, sequence_product
from whet.training.base import Batch, Need, Outputs, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """surrogate x correction + KL - entropy bonus + KL-Cov + NLL of right answers, for each token.

    Columns: `advantage`, `sampler_logp`, and where they are asked for `old_logp`, `ref_logp`, `kl_cov`, `positive`.
    Without `old_logp` the policy that is being trained is the one that sampled, and its ratio is 1.
    """

    config: PolicyConfig
    temperature: float
    kl_coefficient: float
    entropy_coefficient: float = 0.0
    compares: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """Entropy, as a metric or as a term of the loss."""
        return frozenset({"entropy", "entropy_grad"} if self.entropy_coefficient else {"entropy"})

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and per-token metrics."""
        config, columns, rows = self.config, batch.columns, (batch.row_T, batch.rows)
        logp_T, entropy_T = outputs.logp_T, outputs.entropy_T
        assert entropy_T is not None, "it was asked for"
        now_T = logp_T.detach()
        trainer_T = columns["old_logp"] if "old_logp" in columns else now_T
        old_T = columns["sampler_logp"] if config.ratio.denominator == "sampler" else trainer_T
        tokens = Tokens(
            logp_T=logp_T,
            old_logp_T=old_T,
            log_ratio_T=LEVELS[config.ratio.level](logp_T - old_T, *rows),
            advantage_T=columns["advantage"],
            row_T=batch.row_T,
            rows=batch.rows,
        )
        form, constants = FORMS[config.clip.kind], config.clip.model_dump(exclude={"kind"})
        loss_T, stopped_T = form.loss(tokens, **constants), form.stops(tokens, **constants).to(logp_T.dtype)
        measured = {
            "clip_ratio/low_mean": stopped_T * (tokens.advantage_T < 0),
            "clip_ratio/high_mean": stopped_T * (tokens.advantage_T > 0),
            "entropy": entropy_T.detach(),
            "sampling/logp_gap_mean": (trainer_T - columns["sampler_logp"]).abs(),
            "ratio/log_mean": (now_T - old_T).abs(),
        }
        if config.correction is not None:
            log_weight_T = LEVELS[config.correction.level](trainer_T - columns["sampler_logp"], *rows)
            bounds = config.correction
            weight_T = CORRECTIONS[bounds.kind](log_weight_T, low=bounds.low, high=bounds.high)
            loss_T = weight_T * loss_T
            measured["correction/weight_mean"] = weight_T
            measured["correction/changed_mean"] = (weight_T != log_weight_T.exp()).to(logp_T.dtype)
        if "ref_logp" in columns:
            measured["kl"] = divergence.k3(now_T, columns["ref_logp"])
        if config.kl.place == "loss":
            loss_T = loss_T + self.kl_coefficient * self._kl(tokens, columns["ref_logp"])
        if self.entropy_coefficient:
            loss_T = loss_T - self.entropy_coefficient * entropy_T
        if config.kl_cov is not None:
            loss_T = loss_T + config.kl_cov.coefficient * columns["kl_cov"] * (logp_T - old_T).abs()
        if config.positives is not None:
            loss_T = loss_T - config.positives.coefficient * columns["positive"] * logp_T
        count = batch.weight_T.new_tensor(len(logp_T))
        tallies = {name: Tally(total=value.sum(), weight=count) for name, value in measured.items()}
        tallies["loss"] = Tally(total=(batch.weight_T * loss_T.detach()).sum(), weight=torch.ones_like(count))
        return (batch.weight_T * loss_T).sum(), tallies

    def _kl(self, tokens: Tokens, ref_logp_T: Tensor) -> Tensor:
        """The KL term of each token, or at each token that of its whole answer."""
        estimate, logp_T = divergence.LOSSES[self.config.kl.estimator], tokens.logp_T
        if self.config.kl.level == "token":
            return estimate(logp_T, ref_logp_T, logp_T - tokens.old_logp_T)
        logp_T, ref_T, old_T = (
            sequence_product(each, tokens.row_T, tokens.rows) for each in (logp_T, ref_logp_T, tokens.old_logp_T)
        )
        return estimate(logp_T, ref_T, logp_T - old_T)
