"""The online preference stage: tasks, rewards, a feed, and a preference loss on what they rank."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

from whet.algorithms.online_preference import online_preference
from whet.config import OnlinePreferenceStage
from whet.pipeline.held_out import of_tasks
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import check_tasks, feed_of, tasks_of
from whet.pipeline.reference import largest_gap
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Seen, reference_of, training_and_sampling
from whet.tracking.charts import HELD_OUT_TASKS, PREFERENCES, TRAINING, Look
from whet.tracking.log import RunLog
from whet.tracking.text import number


def run_online_preference(context: Context[OnlinePreferenceStage]) -> None:
    """Sample, score, rank, prefer and step until the steps are done."""
    config, steps = context.config, context.config.train.steps
    assert steps is not None
    with closing(rubric(config.tasks, config.rewards, context.world)) as grading, of_tasks(context) as measuring:
        tasks = tasks_of(context, grading)
        policy = context.world.policy(
            context.model,
            config.train,
            config.sampling,
            reference=config.loss.needs_reference and reference_of(context.model, config.reference),
        )
        context.console.say(f"{context.name}: {policy.about}")
        feed = feed_of(context, policy, tasks, grading)
        begin = partial(
            online_preference, policy.trainer, feed, config, steps=steps, max_gap=largest_gap(config, policy)
        )
        log = RunLog(context.folder, policy.template.decode)
        drive(context, policy.trainer, log, begin, steps=steps, feed=feed, measures=measuring(policy))


def check_online_preference(context: Context[OnlinePreferenceStage]) -> Seen:
    """Its tasks; the answers to one that are compared are in one micro-batch."""
    config, seen = context.config, check_tasks(context)
    assert seen.prompt_tokens is not None, "there is no environment"
    compared = config.rollouts_per_prompt if config.pairs == "all" else 2
    uncut = seen.prompt_tokens + compared * config.sampling.max_tokens
    return replace(seen, step_tokens=config.prompts_per_step * uncut, uncut_tokens=uncut)


KIND = Kind(
    config=OnlinePreferenceStage,
    run=run_online_preference,
    check=check_online_preference,
    needs=lambda c: replace(training_and_sampling(c), reference=c.loss.needs_reference and (c.reference or True)),
    look=Look(charts=(*PREFERENCES, *TRAINING), headline=(HELD_OUT_TASKS, ("reward", "the reward", number))),
)
