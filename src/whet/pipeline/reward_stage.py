"""The reward model stage: rows of any kind through the gate, training, and a verdict on what was held out.

STAGE/model/        a sequence classifier; what its numbers mean stands in its config
STAGE/reward.json   how it judges what it has not seen
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from statistics import fmean, pstdev

import numpy as np
import torch

from whet.algorithms.reward_model import objective_of, reward_model, weighed
from whet.algorithms.supervised import supervised_steps
from whet.config import RewardModelStage
from whet.config.reward_model import GateConfig
from whet.evals.judgement import Judgement, Labelled, Ranked, judge_labels, judge_rankings, judge_rivals
from whet.evals.mixture import fixed_mixtures, mixed
from whet.evals.ratings import Rating, Ratings, judge_ratings
from whet.files import write_json
from whet.models.heads import RewardFacts, note_reward_facts
from whet.pipeline.lessons import Lesson, Lessons, lessons, ratings_of
from whet.pipeline.loop import drive
from whet.pipeline.passes import kept_pass
from whet.pipeline.sft_stage import with_evaluation
from whet.pipeline.stage import Context
from whet.records import Metric, Step
from whet.tracking.judged import RULES
from whet.tracking.log import RunLog
from whet.training.base import Trainer
from whet.training.gating import GateTrainer

REFERENCES = 512
"""Comparisons whose answers say where zero is, and one."""
EVALUATED = ("loss", "accuracy")
"""What is measured on held-out data as well."""


def run_reward_model(context: Context) -> None:
    """Train on the rows that pass the gate, then say what the numbers mean and how good they are."""
    config = context.config
    assert isinstance(config, RewardModelStage)
    given = lessons(context.world, config.gate or context.model, config)
    context.console.say(f"{context.name}: {given.described}")
    trainer = (
        context.world.scalar_model(context.model, config.train, objectives=config.objectives)
        if config.gate is None
        else _gate(context, config.gate, config, given)
    )
    atoms = [lesson.atom for lesson in given.taught]
    steps = supervised_steps(len(atoms), config.train)
    unseen = [lesson.atom for lesson in given.held_out]

    def measure() -> Mapping[str, Metric]:
        found = trainer.evaluate(weighed(unseen, config=config), objective_of(config)) if unseen else {}
        return {name: metric for name, metric in found.items() if name.startswith(EVALUATED)}

    def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
        steps_of = reward_model(trainer, atoms, config, seed=context.seed, start=start, state=state)
        return with_evaluation(steps_of, measure, every=config.eval_every, last=steps)

    drive(context, trainer, RunLog(context.folder), begin, steps=steps)
    note_reward_facts(context.folder / "model", _facts(trainer, given, config))
    if given.held_out:
        found = judgement(trainer, given, config)
        write_json(context.folder / "reward.json", asdict(found))
        context.console.say(f"{context.name}: {describe(found)}")


def _gate(context: Context, gate: GateConfig, config: RewardModelStage, given: Lessons) -> GateTrainer:
    """A new gate that knows all answers of the stage: what the frozen model says of them is computed once."""
    trainer = context.world.gate(gate, config.train)
    taught, held_out = ([row for lesson in part for row in lesson.atom.rows] for part in (given.taught, given.held_out))
    for name, rows in (("taught", taught), ("held_out", held_out)):
        folder = context.checkpoints / "features" / name
        read = list(kept_pass(context, folder, rows, trainer.features, model=gate.path, trained=False))
        if read:
            trainer.learn_from(rows, torch.cat(read))
    trainer.debias(taught)
    return trainer


# --------------------------------------------------------------------------------------------- measuring


def judgement(trainer: Trainer, given: Lessons, config: RewardModelStage) -> Judgement | Ratings:
    """How the trained model judges what it has not seen."""
    held_out, scored = given.held_out, _scores(trainer, given.held_out)
    if config.learn == "ratings":
        return judge_ratings(
            {
                name: [
                    Rating(prompt=lesson.prompt, score=end[place], rating=rating, length=lesson.lengths[0])
                    for lesson, ((end,),) in zip(held_out, scored, strict=True)
                    if isfinite(rating := ratings_of(lesson, name))
                ]
                for place, name in enumerate(config.objectives)
            }
        )
    if config.learn == "comparisons":
        ranked = [
            Ranked(prompt=lesson.prompt, scores=tuple(end[0] for (end,) in scores), lengths=lesson.lengths)
            for lesson, scores in zip(held_out, scored, strict=True)
        ]
        rivals = judge_rivals(ranked, _without_gate(trainer, given)) if isinstance(trainer, GateTrainer) else {}
        return replace(judge_rankings(ranked), rivals=rivals)
    ends = config.learn == "outcomes"  # an outcome is judged at the answer's end, however many tokens were taught
    return judge_labels(
        [
            Labelled(prompt=lesson.prompt, score=score, label=label)
            for lesson, (scores,) in zip(held_out, scored, strict=True)
            for (score,), label in list(zip(scores, lesson.atom.rows[0].columns["label"], strict=True))[
                -1 if ends else 0 :
            ]
        ]
    )


def _without_gate(trainer: GateTrainer, given: Lessons) -> Mapping[str, Sequence[tuple[float, ...]]]:
    """The scores of held-out answers by what needs no gate, chosen on the answers that were taught."""
    names = trainer.objectives
    taught, held_out = (
        [np.array([end[1 : 1 + len(names)] for (end,) in answers]) for answers in _scores(trainer, part)]
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


def _facts(trainer: Trainer, given: Lessons, config: RewardModelStage) -> RewardFacts:
    """Where the scale of a reward begins, and its unit; labels have theirs already."""
    if config.learn == "ratings":
        return RewardFacts(ratings=given.scales)
    if config.learn != "comparisons":
        return RewardFacts(reads="steps" if config.learn == "steps" else "answers", link="sigmoid")
    scored = [[end[0] for (end,) in scores] for scores in _scores(trainer, given.taught[:REFERENCES])]
    spread = pstdev([score for scores in scored for score in scores]) if config.normalise == "unit" else 1.0
    found = RewardFacts(mean=fmean(scores[0] for scores in scored), std=spread or 1.0)
    return trainer.described(found) if isinstance(trainer, GateTrainer) else found


def _scores(trainer: Trainer, given: Sequence[Lesson]) -> list[list[tuple[tuple[float, ...], ...]]]:
    """For each lesson, for each of its rows, for each place that is read there, all outputs of the head."""
    found = iter(trainer.scores([row for lesson in given for row in lesson.atom.rows]))
    return [[next(found) for _ in lesson.atom.rows] for lesson in given]
