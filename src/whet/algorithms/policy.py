"""Group-relative policy gradients: GRPO, DAPO, Dr. GRPO and whatever else their axes compose to.

The loop is the algorithm: take groups, give each answer its advantage, weigh the step, forward and backward,
step, publish. A variant is another `PolicyConfig`; there is no branch for any of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from whet.algorithms.measure import measure_groups
from whet.config import PolicyConfig, TrainConfig
from whet.errors import TrainingError
from whet.formulas.advantages import BASELINES, SCALES, group_advantage
from whet.formulas.kl import LOSSES, k3
from whet.formulas.policy import clipped_high, clipped_low, clipped_surrogate
from whet.formulas.reduce import REDUCTIONS
from whet.records import Atom, Group, Metric, Outcome, Step, TokenRow, add_metrics
from whet.rollouts.assemble import to_atoms, to_rows
from whet.rollouts.feed import Feed
from whet.training.base import Batch, Need, Outputs, Tally, Trainer
from whet.training.optim import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """Clipped surrogate plus an optional KL penalty; ratio 1 where a row has no `old_logp` (exactly on-policy)."""

    config: PolicyConfig
    temperature: float
    needs: frozenset[Need] = field(default_factory=lambda: frozenset({"entropy"}))

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted loss, and per-token metrics."""
        clip, kl = self.config.clip, self.config.kl
        logp_T, advantage_T = outputs.logp_T, batch.columns["advantage"]
        old_T = batch.columns["old_logp"] if "old_logp" in batch.columns else logp_T.detach()
        loss_T = clipped_surrogate(logp_T, old_T, advantage_T, low=clip.low, high=clip.high)
        now_T = logp_T.detach()
        measured = {
            "clip_ratio/low_mean": clipped_low(now_T, old_T, advantage_T, low=clip.low),
            "clip_ratio/high_mean": clipped_high(now_T, old_T, advantage_T, high=clip.high),
        }
        if outputs.entropy_T is not None:
            measured["entropy"] = outputs.entropy_T
        if "ref_logp" in batch.columns:
            measured["kl"] = k3(now_T, batch.columns["ref_logp"])
        if kl.place == "loss":
            loss_T = loss_T + kl.coefficient * LOSSES[kl.estimator](logp_T, batch.columns["ref_logp"])
        measured["sampling/logp_gap_mean"] = (old_T - batch.columns["sampler_logp"]).abs()
        count = batch.weight_T.new_tensor(len(logp_T))
        tallies = {name: Tally(total=value.sum(), weight=count) for name, value in measured.items()}
        tallies["loss"] = Tally(total=(batch.weight_T * loss_T.detach()).sum(), weight=batch.weight_T.new_ones(()))
        return (batch.weight_T * loss_T).sum(), tallies


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The constants of a run of `policy_gradient`."""

    config: PolicyConfig
    train: TrainConfig
    steps: int
    prompts_per_step: int
    temperature: float
    max_tokens: int
    max_gap: float
    patience: int = 20
    """Steps in a row without any signal, after which it gives up."""


def policy_gradient(trainer: Trainer, feed: Feed, setting: Setting, *, start: int = 0) -> Iterator[Step]:
    """One `Step` for each batch of rollouts, from step `start` on; `feed` must stand where that step left it."""
    config = setting.config
    objective = PolicyObjective(config=config, temperature=setting.temperature)
    dynamic = config.dynamic_sampling
    barren = 0
    feed.publish(start)
    for step in range(start, setting.steps):
        taken = feed.take(
            setting.prompts_per_step,
            step=step,
            keep=informative if dynamic else None,
            rounds=dynamic.rounds if dynamic else 1,
        )
        began = time.monotonic()
        rows = [give_advantages(group, config) for group in taken.groups]
        rows = provide_logps(trainer, rows, objective)
        rate = learning_rate(step + 1, setting.steps, setting.train)
        metrics, updates = {}, {"grad_norm": 0.0, "optimizer_steps": 0.0, "skipped": 0.0}
        for minibatch in _split(rows, config.minibatches):
            atoms = weigh(minibatch, setting)
            if not atoms:
                continue
            tallies = trainer.forward_backward(atoms, objective)
            _check_gap(tallies, setting, step)
            result = trainer.optim_step(setting.train.lr * rate, muon_lr=setting.train.muon_lr * rate)
            metrics = add_metrics(metrics, tallies)
            updates["grad_norm"] = max(updates["grad_norm"], result.grad_norm)
            updates["optimizer_steps"] += result.applied
            updates["skipped"] += not result.applied
        barren = 0 if updates["optimizer_steps"] else barren + 1
        if barren >= setting.patience:
            raise TrainingError(_why_barren(barren, taken.played))
        feed.publish(step + 1)
        trained = time.monotonic() - began
        seconds = taken.rollout_s + taken.score_s + trained
        measured = measure_groups(taken.played)
        yield Step(
            index=step + 1,
            groups=taken.played,
            state={"position": feed.position},
            metrics={
                **measured,
                **{name: metric.mean for name, metric in metrics.items()},
                **updates,
                "lr": setting.train.lr * rate,
                "groups/trained": float(len(taken.groups)),
                "groups/left_out": float(len(taken.left_out)),
                "groups/rounds": float(taken.rounds),
                "tokens_per_second": measured["sampled_tokens"] / seconds,
                "time/rollout": taken.rollout_s,
                "time/score": taken.score_s,
                "time/train": trained,
            },
        )


def informative(group: Group) -> bool:
    """Whether a group can teach: some of its scored answers are right and some wrong.

    Decided on correctness, not on the shaped reward (DAPO section 3.2: 0 < number correct < G); where no reward
    judges correctness, on whether the rewards differ.
    """
    judged = {episode.score.correct for episode in group.scored}
    if None in judged:
        return len({episode.score.value for episode in group.scored}) > 1
    return len(judged) > 1


def give_advantages(group: Group, config: PolicyConfig) -> list[TokenRow]:
    """The rows of a group's scored episodes, each with its advantage.

    The statistics are taken over all scored episodes; the overlong filter then leaves truncated ones out.
    """
    episodes = group.scored
    if not episodes:
        return []
    rewards_G = torch.tensor([episode.score.value for episode in episodes], dtype=torch.float64)
    advantages = group_advantage(rewards_G, baseline=BASELINES[config.baseline], scale=SCALES[config.scale])
    return [
        row
        for episode, advantage in zip(episodes, advantages.tolist(), strict=True)
        if not (config.overlong_filter and episode.outcome is Outcome.TRUNCATED)
        for row in to_rows(episode, advantage=advantage)
    ]


def provide_logps(
    trainer: Trainer, groups: Sequence[Sequence[TokenRow]], objective: PolicyObjective
) -> list[list[TokenRow]]:
    """Add `ref_logp` where a KL is asked for, and `old_logp` where several updates follow one rollout."""
    wanted: dict[str, bool] = {}
    if objective.config.kl.place != "none":
        wanted["ref_logp"] = True
    if objective.config.minibatches > 1:
        wanted["old_logp"] = False
    rows = [row for group in groups for row in group]
    for name, reference in wanted.items():
        logps = trainer.logprobs(rows, temperature=objective.temperature, reference=reference)
        rows = [row.with_columns(**{name: values}) for row, values in zip(rows, logps, strict=True)]
    done = iter(rows)
    return [[next(done) for _ in group] for group in groups]


def weigh(groups: Sequence[Sequence[TokenRow]], setting: Setting) -> list[Atom]:
    """The atoms of one optimizer step, their weights written over all of its rows.

    Rows without advantage count in the denominators; without a KL they have no gradient and are not computed.
    """
    reduce = REDUCTIONS[setting.config.aggregate]
    if setting.config.aggregate == "sequence_sum_over_constant":
        reduce = partial(reduce, constant=setting.max_tokens)
    rows = [row for group in groups for row in group]
    weights = reduce([row.trained_count for row in rows])
    needed = [
        row.with_columns(weight=(weight,) * row.trained_count)
        for row, weight in zip(rows, weights, strict=True)
        if setting.config.kl.place != "none" or any(row.columns["advantage"])
    ]
    return to_atoms(needed)


def _split(groups: Sequence[list[TokenRow]], parts: int) -> list[list[list[TokenRow]]]:
    """The groups in `parts` minibatches of nearly equal size, whole groups only."""
    bounds = [len(groups) * i // parts for i in range(parts + 1)]
    return [list(groups[low:high]) for low, high in zip(bounds, bounds[1:], strict=False) if high > low]


def _check_gap(metrics: Mapping[str, Metric], setting: Setting, step: int) -> None:
    gap = metrics["sampling/logp_gap_mean"].mean
    if not gap <= setting.max_gap:
        raise TrainingError(
            f"step {step + 1}: sampler and trainer disagree by {gap:.3g} nats per token at the same weights "
            f"(max_gap is {setting.max_gap}); the policy gradient would be wrong"
        )


def _why_barren(steps: int, groups: Sequence[Group]) -> str:
    measured = measure_groups(groups)
    return (
        f"no answer carried a signal for {steps} steps: of the last groups {measured['frac_groups_all_wrong']:.0%} were "
        f"all wrong and {measured['frac_groups_all_right']:.0%} all right; use easier or harder tasks, or more rollouts"
    )
