"""The reward model stage: rows of any kind through the gate, training, and a verdict on what was held out.

STAGE/model/        a sequence classifier; what its numbers mean stands in its config
STAGE/reward.json   how it judges what it has not seen (of `best`, where there is one: best.json)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np

from whet.algorithms.reward_model import objective_of, reward_model, weighed
from whet.algorithms.supervised import largest_step, supervised_steps
from whet.config import RewardModelStage
from whet.evals.judgement import (
    Judgement,
    Labelled,
    Ranked,
    Rating,
    Ratings,
    fixed_mixtures,
    judge_labels,
    judge_rankings,
    judge_ratings,
    judge_rivals,
    mixed,
)
from whet.files import write_json
from whet.models.heads import RewardFacts, note_reward_facts, objectives_in
from whet.pipeline.held_out import of_rows
from whet.pipeline.playing import SHOWN
from whet.pipeline.reward_dataset import RewardDataset, RewardExample, ratings_of, reward_dataset
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Needs, NewGate, Seen, keep_dropped
from whet.records import Column, Metric, TokenRow
from whet.tracking.charts import JUDGEMENT, TRAINING, Look
from whet.tracking.judged import RULES
from whet.tracking.log import RunLog
from whet.tracking.text import number, percent
from whet.training.base import Trainer
from whet.training.engine import most_uncut

REFERENCES = 512
"""Comparisons whose answers say where zero is, and one."""
EVALUATED = ("loss", "accuracy")
"""What is measured on held-out data as well."""


def run_reward_model(context: Context[RewardModelStage]) -> None:
    """Train on the rows that pass the gate, then say what the numbers mean and how good they are."""
    config = context.config
    given = reward_dataset(context.world, context.model, config)
    context.console.say(f"{context.name}: {given.described}")
    for key, lost in given.lost.items():
        keep_dropped(context, key, lost)
    trainer = context.world.scalar_model(
        context.model,
        config.train,
        objectives=config.objectives,
        gate=None if config.gate is None else NewGate(config=config.gate, taught=_rows(given.taught)),
    )
    atoms = [lesson.atom for lesson in given.taught]
    steps = supervised_steps(len(atoms), config.train)
    unseen = [lesson.atom for lesson in given.held_out]

    def measure() -> Mapping[str, Metric]:
        found = trainer.evaluate(weighed(unseen, config=config), objective_of(config))
        return {name: metric for name, metric in found.items() if name.startswith(EVALUATED)}

    def exported(folder: Path) -> None:
        note_reward_facts(folder, _facts(trainer, given, config))
        if given.held_out:
            found = judgement(trainer, given, config, names=objectives_in(folder))
            last = folder.name == "model"
            write_json(context.folder / ("reward.json" if last else "best.json"), asdict(found))
            context.console.say(f"{context.name}: {'' if last else 'the best: '}{describe(found)}")

    measures = [of_rows(measure)] if unseen else []
    begin = partial(reward_model, trainer, atoms, config, seed=context.seed)
    drive(context, trainer, RunLog(context.folder), begin, steps=steps, measures=measures, exported=exported)


# --------------------------------------------------------------------------------------------- measuring


def judgement(
    trainer: Trainer, given: RewardDataset, config: RewardModelStage, *, names: Sequence[str] = ()
) -> Judgement | Ratings:
    """How the trained model judges what it has not seen; `names` are the outputs of its head, where it has several."""
    held_out, scored = given.held_out, _scores(trainer, given.held_out)
    if config.learn == "ratings":
        return judge_ratings(
            {
                name: [
                    Rating(prompt=lesson.prompt, score=float(end[0, place]), rating=rating, length=lesson.lengths[0])
                    for lesson, (end,) in zip(held_out, scored, strict=True)
                    if isfinite(rating := ratings_of(lesson, name))
                ]
                for place, name in enumerate(config.objectives)
            }
        )
    if config.learn == "comparisons":
        ranked = [
            Ranked(prompt=lesson.prompt, scores=tuple(float(end[0, 0]) for end in scores), lengths=lesson.lengths)
            for lesson, scores in zip(held_out, scored, strict=True)
        ]
        rivals = {} if config.gate is None else judge_rivals(ranked, _without_gate(trainer, given, names))
        return replace(judge_rankings(ranked), rivals=rivals)
    ends = config.learn == "outcomes"  # an outcome is judged at the answer's end, however many tokens were taught
    return judge_labels(
        [
            Labelled(prompt=lesson.prompt, score=score, label=label)
            for lesson, (score_TK,) in zip(held_out, scored, strict=True)
            for score, label in list(
                zip(score_TK[:, 0].tolist(), lesson.atom.rows[0].columns["label"].tolist(), strict=True)
            )[-1 if ends else 0 :]
        ]
    )


def _without_gate(
    trainer: Trainer, given: RewardDataset, names: Sequence[str]
) -> Mapping[str, Sequence[tuple[float, ...]]]:
    """The scores of held-out answers by fixed weights over the objectives, chosen on the answers that were taught."""
    taught, held_out = (
        [np.stack([end[0, 1 : 1 + end.shape[1] // 2] for end in answers]) for answers in _scores(trainer, part)]
        for part in (given.taught, given.held_out)
    )
    return {name: mixed(held_out, weights) for name, weights in fixed_mixtures(taught, names).items()}


def describe(found: Judgement | Ratings) -> str:
    """`72.4 % of 312 held-out pairs right (95 % interval 68.9 to 75.9), "the longer one" 55.1 %, ...`."""
    if isinstance(found, Ratings):
        explained = (
            f"{each.name} {each.explained.mean:.1%} ({each.explained.low:.1%} to {each.explained.high:.1%})"
            for each in found.objectives
        )
        return f"explains of the variance of {found.count:,} held-out ratings (95 % interval): {', '.join(explained)}"
    at = found.accuracy
    rivals = "".join(f", {name!r} {rival.accuracy.mean:.1%}" for name, rival in found.rivals.items())
    rule = RULES[found.what]
    return (
        f"{at.mean:.1%} of {found.count:,} held-out {found.what} right (95 % interval {at.low:.1%} to {at.high:.1%}, "
        f"{at.questions:,} prompts), ties {found.ties:.1%}; {rule!r} has {found.baseline.mean:.1%}{rivals}; "
        f"calibration error {found.calibration_error:.3f}"
    )


def _facts(trainer: Trainer, given: RewardDataset, config: RewardModelStage) -> RewardFacts:
    """Where the scale of a reward begins, and its unit; labels have theirs already."""
    if config.learn == "ratings":
        return RewardFacts(ratings=given.scales)
    if config.learn != "comparisons":
        return RewardFacts(reads="steps" if config.learn == "steps" else "answers", link="sigmoid")
    scored = [[float(end[0, 0]) for end in scores] for scores in _scores(trainer, given.taught[:REFERENCES])]
    spread = pstdev([score for scores in scored for score in scores]) if config.normalise == "unit" else 1.0
    return RewardFacts(mean=fmean(scores[0] for scores in scored), std=spread or 1.0)


def _rows(given: Sequence[RewardExample]) -> list[TokenRow]:
    return [row for lesson in given for row in lesson.atom.rows]


def _scores(trainer: Trainer, given: Sequence[RewardExample]) -> list[list[Column]]:
    """For each lesson and each of its rows all outputs of the head, (places read, K)."""
    found = iter(trainer.forward(_rows(given), "score")["score"])
    return [[next(found) for _ in lesson.atom.rows] for lesson in given]


def check_reward_model(context: Context[RewardModelStage]) -> Seen:
    """All rows through the gate."""
    given = reward_dataset(context.world, context.model, context.config)
    costs = [lesson.atom.cost for lesson in given.taught]
    largest, compares = largest_step(costs, context.config.train, context.seed), objective_of(context.config).compares
    uncut = most_uncut([lesson.atom for lesson in given.taught], together=compares)
    shown = _rows(given.taught[:SHOWN])
    return Seen(summary=given.described, rows=shown, step_tokens=largest, uncut_tokens=uncut)


KIND = Kind(
    config=RewardModelStage,
    run=run_reward_model,
    check=check_reward_model,
    needs=lambda config: Needs(train=config.train if config.gate is None else None, scalar=True),
    look=Look(
        charts=(*JUDGEMENT, *TRAINING),
        headline=(
            ("eval_accuracy", "the accuracy on held-out data", percent),
            ("accuracy", "the accuracy", percent),
            ("eval_loss", "the squared error of held-out ratings", number),
            ("loss", "the squared error of ratings", number),
        ),
    ),
)
