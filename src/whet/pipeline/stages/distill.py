"""The distill stage: what the teacher says of given rows, a feed of the student's own answers, training, model.

STAGE/teacher/NAME   the teacher's likeliest tokens at every token of the rows: computed once
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial

from whet.algorithms.distill import Distillation, OwnAnswers, distill
from whet.algorithms.sft import weigh_again
from whet.algorithms.supervised import supervised_steps
from whet.config import DistillStage
from whet.data.mixture import Blend
from whet.formulas.constants import Bound
from whet.formulas.distill import DIVERGENCES
from whet.pipeline.gate import look_at_rows, rows_to_imitate
from whet.pipeline.held_out import of_rows, of_tasks
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import evaluation_summary, feed_of, look_at_tasks, tasks_of
from whet.pipeline.reference import with_teacher
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Needs, Seen
from whet.records import Atom
from whet.tracking.charts import HELD_OUT_TASKS, IMITATION, TRAINING, Look
from whet.tracking.log import RunLog
from whet.tracking.text import number


def run_distill(context: Context[DistillStage]) -> None:
    """Let the teacher read the rows, then bring the student's distributions to its."""
    config, world = context.config, context.world
    atoms, blend, held_out = _given(context)
    with ExitStack() as opened:
        grading = None
        if config.tasks is not None:
            grading = opened.enter_context(closing(rubric(config.tasks, config.rewards, world)))
        measuring = opened.enter_context(of_tasks(context))
        tasks = () if grading is None else tasks_of(context, grading)
        teacher = None if grading is None else config.teacher
        policy = world.policy(context.model, config.train, config.sampling, teacher=teacher)
        context.console.say(f"{context.name}: {policy.about}")
        own = feed = None
        if grading is not None:
            share = 1.0 if config.data is None else config.on_policy
            feed = feed_of(context, policy, tasks, grading)
            own = OwnAnswers(feed=feed, prompts_per_step=config.prompts_per_step, top_k=config.top_k, share=share)
        objective = objective_of(config)
        steps = supervised_steps(len(atoms), config.train)
        given = (policy.trainer, atoms, own, objective, config.train)
        begin = partial(distill, *given, steps=steps, seed=context.seed, blend=blend)
        loss = of_rows(lambda: policy.trainer.evaluate(weigh_again(held_out), objective))
        log = RunLog(context.folder, policy.template.decode)
        measures = [*([loss] if held_out else []), *measuring(policy)]
        drive(context, policy.trainer, log, begin, steps=steps, feed=feed, measures=measures)


def objective_of(config: DistillStage) -> Distillation:
    """The divergence with its constant."""
    constants = {"beta": config.beta} if config.divergence == "jsd" else {}
    return Distillation(divergence=Bound(DIVERGENCES[config.divergence], **constants), temperature=config.temperature)


def _given(context: Context[DistillStage]) -> tuple[Sequence[Atom], Blend, Sequence[Atom]]:
    """The given rows and those held out, each with what the teacher says of it; the teacher is gone then."""
    config = context.config
    if config.data is None:
        return (), Blend(()), ()
    data, held_out = rows_to_imitate(context)
    teacher = cache(lambda: context.world.teacher(config.teacher, context.model))
    read = partial(with_teacher, context, teacher, k=config.top_k, temperature=config.temperature)
    atoms, unseen = ([Atom(rows=(row,)) for row in rows] for rows in (data.rows, held_out))
    return read(atoms, "train"), data.blend, read(unseen, "eval")


def check_distill(context: Context[DistillStage]) -> Seen:
    """The rows and the tasks."""
    config = context.config
    seen = [look_at_rows(context)] if config.data is not None else []
    seen += [look_at_tasks(context)[0]] if config.tasks is not None else []
    said = [*(each.summary for each in seen), *evaluation_summary(context)]
    known = [each.step_tokens for each in seen if each.step_tokens is not None]
    largest = max(known) if len(known) == len(seen) else None
    return replace(seen[-1], summary="; ".join(said), rows=seen[0].rows, step_tokens=largest)


KIND = Kind(
    config=DistillStage,
    run=run_distill,
    check=check_distill,
    needs=lambda config: Needs(train=config.train, sampling=None if config.tasks is None else config.sampling),
    look=Look(
        charts=(*IMITATION, *TRAINING), headline=(HELD_OUT_TASKS, ("loss", "the divergence from the teacher", number))
    ),
)
