"""Online preference optimisation: sample, rank by reward, prefer, and again - on the feed that RL has.

Of the answers to a prompt the best and the worst are a pair; where all have the same reward there is none, and where an
answer could not be scored it is in none. Both are counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from whet.algorithms.groups import BARREN, measure_groups, measure_taken, to_rows, unscored
from whet.algorithms.preference import check_start, objective_of, weigh_preferences
from whet.algorithms.supervised import NOT_FINITE
from whet.config import LossConfig, OnlinePreferenceStage
from whet.errors import TrainingError
from whet.records import Atom, Episode, Group, Metric, Step, TokenRow, add_metrics
from whet.rollouts.feed import Feed
from whet.training.base import REFERENCE, Trainer
from whet.training.optim import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """What a run carries from step to step besides weights and the feed."""

    updates: float = 0.0
    barren: float = 0.0
    """Steps in a row without a pair."""
    thrown_away: float = 0.0
    """Updates in a row whose gradient was not finite."""

    @property
    def saved(self) -> dict[str, float]:
        """As numbers for a step's state."""
        return {"updates": self.updates, "barren": self.barren, "thrown_away": self.thrown_away}


def online_preference(
    trainer: Trainer,
    feed: Feed,
    config: OnlinePreferenceStage,
    *,
    steps: int,
    max_gap: float,
    start: int = 0,
    state: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """One `Step` for each batch of answers, from step `start` on; `feed` must stand where that step left it.

    `state` is what the `Step` before `start` carried. Raises `TrainingError` where the policy is further than `max_gap`
    nats per token from its reference before the first update, and where nothing can be preferred, or the gradient is
    not finite, again and again.
    """
    counts = RunCounts(**{name: state[name] for name in RunCounts().saved}) if state else RunCounts()
    feed.publish(start)
    for step in range(start, steps):
        taken = feed.take(config.prompts_per_step, step=step)
        began = time.monotonic()
        found = [ranked(group, all_pairs=config.pairs == "all") for group in taken.groups]
        atoms = with_reference([atom for atom in found if atom is not None], trainer, config.loss)
        rate = learning_rate(step + 1, steps, config.train)
        metrics, counts = _update(trainer, atoms, config, counts, rate=rate, max_gap=max_gap)
        if config.update_reference_every is not None and (step + 1) % config.update_reference_every == 0:
            trainer.update_frozen(REFERENCE, 0.0)
        feed.publish(step + 1)
        yield Step(
            index=step + 1,
            groups=taken.played,
            metrics={
                **measure_groups(taken.played),
                **measure_taken(taken, time.monotonic() - began),
                **metrics,
                "pairs/prompts": float(len(atoms)),
                "pairs/tied": float(sum(len(g.scored) >= 2 for g in taken.groups) - len(atoms)),
                "pairs/unscored": float(sum(len(g.scored) < 2 for g in taken.groups)),
                "lr": config.train.lr * rate,
            },
            state={**feed.state, **counts.saved},
            notes=(*unscored(taken.played), *(() if atoms else ("no update: no prompt had answers of unlike reward",))),
        )


def ranked(group: Group, *, all_pairs: bool) -> Atom | None:
    """The group's best and worst answer (or one of each reward, the best first) as an atom; None where none differ."""
    by_reward: dict[float, Episode] = {}
    for episode in group.scored:
        assert episode.score.value is not None, "scored"
        by_reward.setdefault(episode.score.value, episode)
    order = sorted(by_reward, reverse=True)
    rows = [_row(by_reward[reward]) for reward in (order if all_pairs else [*order[:1], *order[1:][-1:]])]
    return Atom(rows=tuple(rows)) if len(rows) > 1 else None


def with_reference(atoms: Sequence[Atom], trainer: Trainer, loss: LossConfig) -> list[Atom]:
    """Add `ref_logp`, where the loss has a reference."""
    if not loss.needs_reference:
        return list(atoms)
    rows = [row for atom in atoms for row in atom.rows]
    logps = iter(trainer.forward(rows, "logp", frozen=REFERENCE)["logp"])
    return [Atom(rows=tuple(row.with_columns(ref_logp=next(logps)) for row in atom.rows)) for atom in atoms]


def _row(episode: Episode) -> TokenRow:
    """The episode's answer; what the sampler said of it is left behind, since these losses are of no sampler."""
    (row,) = to_rows(episode)
    return replace(row, columns={})


def _update(
    trainer: Trainer,
    atoms: Sequence[Atom],
    config: OnlinePreferenceStage,
    counts: RunCounts,
    *,
    rate: float,
    max_gap: float,
) -> tuple[dict[str, float], RunCounts]:
    """The optimizer steps that follow one batch of answers, each on its share of the prompts."""
    tallies: dict[str, Metric] = {}
    norms, skipped = [], 0
    size = -(-len(atoms) // config.minibatches)
    for first in range(0, len(atoms), max(1, size)):
        batch = weigh_preferences(atoms[first : first + size], loss=config.loss, trainer=trainer)
        found = trainer.forward_backward(batch, objective_of(config.loss))
        if not counts.updates:
            check_start({name: metric.mean for name, metric in found.items()}, max_gap)
        tallies = add_metrics(tallies, found)
        result = trainer.optim_step(rate)
        norms.append(result.grad_norm)
        skipped += not result.applied
        thrown_away = 0.0 if result.applied else counts.thrown_away + 1
        counts = replace(counts, updates=counts.updates + 1, thrown_away=thrown_away)
        if thrown_away >= NOT_FINITE:
            raise TrainingError(f"the gradient was not finite in {NOT_FINITE} updates in a row; lower train.lr")
    counts = replace(counts, barren=0.0 if norms else counts.barren + 1)
    if counts.barren >= BARREN:
        raise TrainingError(
            f"no prompt had two answers of different reward in {BARREN} steps; choose easier or harder tasks, a finer "
            "reward, more rollouts_per_prompt, or a higher sampling.temperature"
        )
    measured = {name: metric.mean for name, metric in tallies.items() if name != "oom_retries"}
    retries = tallies["oom_retries"].total if "oom_retries" in tallies else 0.0
    return {
        **measured,
        "grad_norm": max(norms, default=0.0),
        "optimizer_steps": float(len(norms) - skipped),
        "skipped": float(skipped),
        "oom_retries": retries,
    }, counts
