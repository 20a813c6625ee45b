"""Policy gradients: PPO, GRPO, DAPO, RLOO, GSPO and whatever else the axes of `PolicyConfig` compose to.

The loop is the algorithm: take groups, give each token its advantage, weigh the step, forward and backward, step,
publish. A variant is another `PolicyConfig`; there is no branch for any of them. A critic, where there is one, is one
more provider of columns, and learns after the policy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from whet.algorithms.columns import (
    measure_lag,
    sequence_kl,
    trained_once,
    with_advantages,
    with_filters,
    with_gains,
    with_lags,
    with_logps,
    with_mean_advantages,
    with_rewards,
    with_values,
)
from whet.algorithms.critic import Critic, ValueLoss, WithValue
from whet.algorithms.groups import (
    BARREN,
    Answer,
    drop_nonfinite,
    find_nonfinite,
    listed,
    measure_groups,
    measure_taken,
    minibatches,
    skipped_update,
    to_answers,
    to_atoms,
    unscored,
    why_no_signal,
)
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.roles import angle, norms_apart
from whet.algorithms.state import RunState, Setting
from whet.config import PolicyConfig
from whet.config.policy_terms import KLConfig
from whet.errors import TrainingError
from whet.formulas.step import REDUCTIONS
from whet.records import Atom, Group, Metric, Step, add_metrics, largest, seed_of
from whet.rollouts.feed import Feed
from whet.training.base import REFERENCE, Objective, Trainer
from whet.training.optim import learning_rate

GAP = "sampling/logp_gap_mean"
FAR = "sampling/logp_gap_far"
MAX_GAP = {"float32": 0.01, "bfloat16": 0.1}
"""Largest mean gap by precision, in nats. Between two engines at the same weights float32 stays below 1e-5 and bfloat16
below 0.03; another temperature, template, position or version of the weights is an order of magnitude above."""
DROPOUT_GAP = 0.5
"""The same where an adapter's dropout acts in training."""
TAIL = 5.0
"""The 99th percentile of the gap may be this many times the largest mean: that of an exponential tail is 4.6 of its."""
LEAST_ESS = 0.5
"""Effective sample size, as a share of the tokens, below which rollouts are said to be too old."""
SAME_WEIGHTS = 0.02
"""Largest mean |log ratio| of two passes of the trainer over the same weights. float32 stays below 1e-5 and bfloat16
below 1e-2; another mask, temperature or a dropout is an order of magnitude above."""


def policy_gradient(
    trainer: Trainer,
    feed: Feed,
    setting: Setting,
    *,
    critic: Critic | None = None,
    start: int = 0,
    state: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """One `Step` for each batch of rollouts, from step `start` on; `feed` must stand where that step left it.

    `state` is what the `Step` before `start` carried. A recipe with `credit: gae` needs its critic.
    """
    assert (critic is None) == (setting.config.critic is None), "the critic that the recipe asks for"
    standing = RunState.start(setting, state or {})
    dynamic = setting.config.dynamic_sampling
    keep, rounds = (None, 1) if dynamic is None else (informative, dynamic.rounds)
    feed.publish(start)
    for step in range(start, setting.steps):
        taken = feed.take(setting.prompts_per_step, step=step, keep=keep, rounds=rounds)
        began = time.monotonic()
        played = measure_groups(taken.played)
        standing = standing.seeing(played, still=pretraining(setting.config, step))
        check_engine(taken.gap, setting, step)
        answers = to_answers(taken.groups, standing.reward)
        standing = replace(standing, spread=standing.spread.merge([answer.reward for answer in answers]))
        ready = prepare(trainer, critic, answers, setting, standing, step=step)
        rate = standing.health.rate * learning_rate(step + 1, setting.steps, setting.train)
        updates, faults = update(trainer, critic, ready.answers, setting, standing, step=step, rate=rate)
        faults += [f"left out: {listed(ready.left_out, step + 1)}"] if ready.left_out else []
        faults += too_old(ready.metrics)
        _renew_reference(trainer, setting.config.kl, step + 1)
        feed.publish(step + 1)
        metrics = {
            **played,
            **ready.metrics,
            **updates,
            **_measure_control(setting.config, standing, ready.answers),
            **({} if taken.gap is None else {"sampling/engine_gap": taken.gap}),
            "not_finite": float(len(ready.left_out)),
            **measure_taken(taken, time.monotonic() - began),
            "lr": setting.train.lr * rate,
        }
        standing = standing.after(metrics, setting, answers=len(answers))
        if standing.barren and not faults:
            faults = [f"no update: {why_no_signal(taken.played, overlong_filter=setting.config.overlong_filter)}"]
        if standing.barren >= BARREN:
            raise TrainingError(f"no answer carried a signal for {BARREN} steps: {'; '.join(faults)}")
        health = standing.health
        yield Step(
            index=step + 1,
            groups=(*with_mean_advantages(taken.groups, ready.answers), *taken.left_out),
            metrics=metrics,
            state={**feed.state, **standing.saved},
            notes=(*unscored(taken.played), *faults, *(str(finding) for finding in health.findings)),
            ill=health.fatal is not None,
        )
        if health.fatal is not None:
            raise TrainingError(f"step {step + 1}: {health.fatal}")


def _renew_reference(trainer: Trainer, kl: KLConfig, step: int) -> None:
    """Move the reference towards the policy, every so many steps."""
    if kl.update_every and step % kl.update_every == 0:
        trainer.update_frozen(REFERENCE, kl.ema_decay)


def update(
    trainer: Trainer,
    critic: Critic | None,
    answers: Sequence[Answer],
    setting: Setting,
    standing: RunState,
    *,
    step: int,
    rate: float,
) -> tuple[dict[str, float], list[str]]:
    """The optimizer steps that follow one batch of rollouts: the policy's, by minibatches, and the critic's.

    While the critic is pretrained the policy stands still. `rate` is the share of the peak learning rates. Returned
    are the metrics, and a line for each update that was skipped because its gradient was not finite.
    """
    config, objective = setting.config, objective_of(critic, setting, standing)
    tallies: dict[str, Metric] = {}
    norms: list[float] = []
    faults: list[str] = []
    passes = 0
    still = pretraining(config, step)
    for place, minibatch in enumerate(_split(answers, 1 if still else config.minibatches)):
        atoms = weigh(minibatch, setting)
        if not atoms:
            continue
        measured = setting.roles is not None and setting.roles.angle and not still and not passes
        apart = norms_apart(trainer, atoms, objective) if measured else None
        found = trainer.evaluate(atoms, objective) if still else trainer.forward_backward(atoms, objective)
        if not passes:
            check_first_update(found, setting, step, untouched=not standing.updates)
            gap = {name: found[name] for name in (GAP, FAR)}  # of later updates it would measure the policy's own move
        tallies, passes = add_metrics(tallies, found) | gap, passes + 1
        if not still:
            if setting.mix is not None:
                tallies = add_metrics(tallies, setting.mix.add(trainer, step * config.minibatches + place))
            result = trainer.optim_step(rate)
            norms.append(result.grad_norm)
            if apart is not None and setting.mix is None:
                tallies["roles/angle"] = Metric(angle(result.grad_norm, *apart))
            if not result.applied:
                alone = find_nonfinite(trainer, [(answer, weigh([answer], setting)) for answer in minibatch], objective)
                who = f"of {listed(alone, step + 1)}" if alone else "though each answer's own loss is"
                faults.append(f"{skipped_update(result)}: the loss {who}")
    updates = _measure_updates(tallies, norms, passes=passes, skipped=len(faults))
    if critic is None or critic.config.share_trunk or not answers:
        return updates, faults
    rows = [row for answer in answers for row in answer.rows]
    seed = seed_of(setting.seed, "critic", step)
    return updates | critic.update(rows, lr_factor=rate, seed=seed), faults


def objective_of(critic: Critic | None, setting: Setting, standing: RunState) -> Objective:
    """What the policy learns by now, and with a shared trunk its critic in the same pass."""
    policy = policy_loss(
        setting.config,
        temperature=setting.temperature,
        kl_coefficient=standing.coefficients.kl,
        entropy_coefficient=standing.coefficients.entropy,
        far=TAIL * setting.max_gap,
    )
    if critic is None or not critic.config.share_trunk:
        return policy
    return WithValue(policy=policy, value=ValueLoss(clip=critic.config.clip), coefficient=critic.config.coefficient)


def pretraining(config: PolicyConfig, step: int) -> bool:
    """Whether only the critic learns in this step."""
    return config.critic is not None and step < config.critic.pretrain_steps


def informative(group: Group) -> bool:
    """Whether a group can teach: some of its scored answers are right and some wrong.

    Decided on correctness, not on the shaped reward (DAPO section 3.2: 0 < number correct < G).
    """
    return len({episode.score.correct for episode in group.scored} - {None}) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A step's answers, ready for the objective."""

    answers: list[Answer]
    metrics: Mapping[str, float]
    """What the critic measured, if there is one, what turns gained, and how old the answers are, if they may be."""
    left_out: list[str]
    """The answers with a number that is not finite, by name; they are in no statistic."""


def prepare(
    trainer: Trainer,
    critic: Critic | None,
    answers: Sequence[Answer],
    setting: Setting,
    standing: RunState,
    *,
    step: int,
) -> Prepared:
    """The answers with every column that the objective reads; whatever is not finite is left out where it appears."""
    config, temperature, lagging = setting.config, setting.temperature, setting.lag > 0
    answers = answers if setting.roles is None else setting.roles.with_column(answers)
    measured: Mapping[str, float] = {}
    answers = with_lags(answers, step) if lagging else answers
    answers, first = drop_nonfinite(with_logps(answers, trainer, config, temperature=temperature, lagging=lagging))
    gained: Mapping[str, float] = {}
    if setting.gain is not None:
        answers, gained = with_gains(answers, trainer, setting.gain)
    answers = with_rewards(answers, config, kl_coefficient=standing.coefficients.kl, spread=standing.spread)
    second: list[str] = []
    if critic is not None and answers:
        judge = replace(critic, config=critic.config.monte_carlo) if pretraining(config, step) else critic
        answers, measured = with_values(answers, judge)
        answers, second = drop_nonfinite(answers)
    answers, third = drop_nonfinite(with_advantages(answers, config, weights=standing.weights(setting)))
    seed = seed_of(setting.seed, "token filter", step)
    answers = with_filters(answers, trainer, config, temperature=temperature, seed=seed)
    measured = {**measured, **gained, **(measure_lag(answers) if lagging else {})}
    return Prepared(answers=answers, metrics=measured, left_out=first + second + third)


def weigh(answers: Sequence[Answer], setting: Setting) -> list[Atom]:
    """The atoms of one optimizer step; an answer weighs the same in however many rows it is.

    Rows without advantage count in the denominators; where nothing else gives them a gradient they are not computed.
    Rows without trained tokens (an empty answer) have nothing to compute. Rewards are in the advantages by now.
    """
    reduce, everywhere = REDUCTIONS[setting.config.reduction], _has_gradient_everywhere(setting.config)
    answers = trained_once(answers) if setting.config.credit == "tree" else answers
    answers = answers if setting.roles is None else setting.roles.trained(answers)
    weights = reduce([answer.length for answer in answers], [answer.group for answer in answers], setting.max_tokens)
    return to_atoms(
        [
            replace(row, columns={name: v for name, v in row.columns.items() if name != "reward"}).with_columns(
                weight=weight
            )
            for answer, weight in zip(answers, weights, strict=True)
            for row in answer.rows
            if row.columns["advantage"].any() or (row.trained_count and everywhere)
        ]
    )


def _has_gradient_everywhere(config: PolicyConfig) -> bool:
    """Whether the loss has a gradient at tokens without an advantage."""
    return (
        config.kl.place == "loss"
        or config.entropy.target is not None
        or config.entropy.coefficient > 0
        or config.kl_cov is not None
        or config.positive_nll is not None
        or (config.critic is not None and config.critic.share_trunk)
        or config.clip.kind in ("quadratic", "function")
    )


def check_engine(gap: float | None, setting: Setting, step: int) -> None:
    """Stop where a sampler apart computes other log-probabilities than the trainer at one version, on a probe."""
    if gap is not None and not gap <= setting.max_gap:
        raise TrainingError(
            f"step {step + 1}: samplers and trainer disagree by {gap:.3g} nats per token on a probe of one version "
            f"(max_gap is {setting.max_gap:g}); the policy gradient would be wrong"
        )


def too_old(metrics: Mapping[str, float]) -> list[str]:
    """A line where a step's rollouts have little left to say of the policy that learns from them."""
    ess = metrics.get("lag/ess", 1.0)
    advice = "lower train.lr or lag.steps"
    return [f"the rollouts are old: their effective sample size is {ess:.0%}; {advice}"] if ess < LEAST_ESS else []


def check_first_update(metrics: Mapping[str, Metric], setting: Setting, step: int, *, untouched: bool) -> None:
    """Stop where numbers that must agree do not: the rollouts' weights are still the trainer's.

    In every step sampler and trainer must agree to `max_gap` in the mean, and to `TAIL` times that on 99 of 100 tokens:
    a few tokens that are quite wrong (positions, a stop token, a template) hardly move a mean. While the policy is
    `untouched` by any update the trainer must also agree with itself (the ratio is 1), and with the reference where
    that is what it started from (KL 0).
    """
    gap = metrics[GAP].mean
    if metrics[GAP].weight and not gap <= setting.max_gap:  # with a lag there may be no token of these weights
        raise TrainingError(
            f"step {step + 1}: sampler and trainer disagree by {gap:.3g} nats per token at the same weights "
            f"(max_gap is {setting.max_gap:g}); the policy gradient would be wrong. Is there a dropout "
            "(train.lora.dropout)? It is in the trainer alone; else raise max_gap if the gap is meant"
        )
    far = metrics[FAR].mean
    if not metrics[FAR].total <= max(1.0, 0.01 * metrics[FAR].weight):  # of a few tokens one may be far
        raise TrainingError(
            f"step {step + 1}: sampler and trainer disagree by more than {TAIL * setting.max_gap:g} nats on {far:.1%} "
            f"of the tokens at the same weights ({TAIL:g} x max_gap, for at most 1%), and by {gap:.3g} in the mean; "
            "the policy gradient would be wrong"
        )
    drift = metrics["ratio/log_mean"].mean if setting.config.ratio.denominator == "old" else 0.0
    if untouched and not drift <= SAME_WEIGHTS:
        raise TrainingError(
            f"step {step + 1}: two passes of the trainer over the same weights differ by {drift:.3g} nats per token, "
            f"so the first ratio is not 1 (tolerance {SAME_WEIGHTS}); is there a dropout (train.lora.dropout)?"
        )
    started = untouched and setting.config.kl.reference is None
    if started and "kl" in metrics and not metrics["kl"].mean <= SAME_WEIGHTS**2 / 2:
        raise TrainingError(
            f"step {step + 1}: the policy is its own reference, yet the KL is {metrics['kl'].mean:.3g} nats per token "
            f"(tolerance {SAME_WEIGHTS**2 / 2:.0e}); is there a dropout (train.lora.dropout)?"
        )


def _split(answers: Sequence[Answer], parts: int) -> list[list[Answer]]:
    """The answers in `parts` minibatches of nearly equal size, whole groups only; none is empty."""
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.group, []).append(answer)
    return [[answer for group in piece for answer in group] for piece in minibatches(list(groups.values()), parts)]


def _measure_updates(
    tallies: Mapping[str, Metric], norms: Sequence[float], *, passes: int, skipped: int
) -> dict[str, float]:
    """What the updates of one step came to: `tallies` of all their `passes`, a gradient norm of each that moved."""
    return {
        **{name: metric.mean for name, metric in tallies.items()},
        # Sums over micro-batches, whose number means nothing: by update, and in all.
        **{name: tallies[name].total / passes for name in ("loss", "value/loss") if name in tallies},
        **{name: tallies[name].total for name in ("oom_retries",) if name in tallies},
        "grad_norm": largest(norms),
        "optimizer_steps": float(len(norms) - skipped),
        "value/optimizer_steps": 0.0,
        "skipped": float(skipped),
    }


def _measure_control(config: PolicyConfig, now: RunState, answers: Sequence[Answer]) -> dict[str, float]:
    """What the controllers look at and where they stand, for the terms that are in use."""
    metrics = {}
    if config.kl.place != "none":
        metrics["kl/coefficient"] = now.coefficients.kl
        if answers:
            metrics["kl/sequence"] = sequence_kl(answers)
    if config.entropy.target is not None or now.coefficients.entropy:
        metrics["entropy/coefficient"] = now.coefficients.entropy
    if now.charge is not None:
        metrics["constraint/multiplier"] = now.charge.multiplier
    return metrics
