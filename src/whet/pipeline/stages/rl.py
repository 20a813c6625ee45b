"""The RL stage: tasks, rewards, a feed, and the policy gradient between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

from whet.algorithms.critic import Critic
from whet.algorithms.policy import DROPOUT_GAP, MAX_GAP, policy_gradient
from whet.algorithms.roles import Roles
from whet.algorithms.sft import PretrainingMix
from whet.algorithms.state import Setting
from whet.algorithms.turns import Gain
from whet.config import ModelConfig, RLStage
from whet.config.rewards import weights
from whet.envs.base import Task, require
from whet.envs.tools.play import Environments
from whet.errors import ConfigError, DataError
from whet.models.load import read_vocabulary
from whet.models.marks import RoleTable
from whet.models.tokenizer import load_tokenizer
from whet.pipeline.gate import gate
from whet.pipeline.held_out import of_tasks
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import feed_of, look_at_tasks, opened, tasks_of
from whet.pipeline.runner import drive
from whet.pipeline.stage import (
    Context,
    Kind,
    Needs,
    Policy,
    Seen,
    World,
    keep_dropped,
    reference_of,
    training_and_sampling,
)
from whet.records import token_ids
from whet.rollouts.curriculum import Curriculum, hardness_of
from whet.rollouts.ledger import AheadFeed
from whet.tracking.charts import HELD_OUT_TASKS, TRAINING, Look
from whet.tracking.log import RunLog
from whet.tracking.text import number, percent
from whet.training.tokenize import Gated


def run_rl(context: Context[RLStage]) -> None:
    """Sample, score, weigh and step until the steps are done."""
    with opened(context.config.environment, context.world) as environment, ExitStack() as ends:
        _run(context, environment, ends)


def _run(context: Context[RLStage], environment: Environments | None, ends: ExitStack) -> None:
    config, kl = context.config, context.config.algorithm.kl
    assert config.train.steps is not None
    with (
        closing(rubric(config.tasks, config.rewards, context.world)) as grading,
        of_tasks(context, environment) as measuring,
    ):
        _check_states(config, environment)
        tasks = tasks_of(context, grading, environment)
        for line in config.algorithm.cautions(prompts=config.prompts_per_step):
            context.console.say(f"{context.name}: {line}")
        mix = _mix(context, config)
        policy = context.world.policy(
            context.model,
            config.train,
            config.sampling,
            reference=kl.place != "none" and reference_of(context.model, kl.reference),
            teacher=config.algorithm.teacher,
            with_value=config.algorithm.shares_trunk,
            lag=config.lag,
        )
        ends.callback(policy.close)
        context.console.say(f"{context.name}: {policy.about}")
        critic = _critic(context, config, policy)
        greedy, curriculum = config.algorithm.baseline == "greedy", None
        if config.curriculum is not None:
            hardness = hardness_of(tasks, config.curriculum)
            curriculum = Curriculum(config=config.curriculum, tasks=len(tasks), hardness=hardness)
        feed = feed_of(context, policy, tasks, grading, environment=environment, greedy=greedy, curriculum=curriculum)
        setting = Setting(
            config=config.algorithm,
            train=config.train,
            steps=config.train.steps,
            prompts_per_step=config.prompts_per_step,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            max_gap=_max_gap(config, policy),
            weights=weights(config.rewards),
            constraint=config.constraint,
            health=config.health,
            seed=context.seed,
            lag=config.lag.steps,
            roles=_roles(config, context.model),
            gain=_gain(config, context.model, tasks, policy.max_length),
            mix=mix,
        )
        begin = partial(policy_gradient, policy.trainer, feed, setting, critic=critic)
        log = RunLog(context.folder, policy.template.decode)
        if isinstance(feed, AheadFeed):
            ends.callback(feed.close)
        steps, measures = setting.steps, measuring(policy)
        own = None if critic is None or critic.trainer is policy.trainer else critic.trainer
        drive(context, policy.trainer, log, begin, steps=steps, feed=feed, critic=own, measures=measures)


def _check_states(config: RLStage, environment: Environments | None) -> None:
    if config.algorithm.baseline == "same_state" and (environment is None or "state" not in environment.hooks):
        raise ConfigError(
            "algorithm.baseline: same_state compares turns that began in the same state, and the environment gives "
            "none; add a method state() to its class, or use turn_leave_one_out"
        )


def _roles(config: RLStage, model: ModelConfig) -> Roles | None:
    """What the recipe asks of the roles of tokens."""
    asked = config.train.roles
    if asked is None:
        return None
    table = RoleTable.of(load_tokenizer(model), read_vocabulary(model), asked.marks)
    return Roles(table=table, only=asked.only, angle=asked.angle)


def _gain(config: RLStage, model: ModelConfig, tasks: Sequence[Task], max_length: int) -> Gain | None:
    """What the recipe asks of the information in a turn. Raises `DataError` for a task without the right answer."""
    asked = config.algorithm.gain
    if asked is None:
        return None
    tokenizer, golds = load_tokenizer(model), {}
    before = token_ids(tokenizer.encode(asked.before, add_special_tokens=False))
    for task in tasks:
        gold = require(task, asked.gold, "algorithm.gain")
        text = str(gold[0] if isinstance(gold, list) and gold else gold)
        golds[task.id] = before, token_ids(tokenizer.encode(text, add_special_tokens=False))
        if not len(golds[task.id][1]):
            raise DataError(f"task {task.id}: the answer in {asked.gold!r} is empty; leave the task out, or gain")
    return Gain(golds=golds, weight=asked.weight, max_length=max_length)


def _max_gap(config: RLStage, policy: Policy) -> float:
    """The recipe's, or that of the precision; dropout is in the trainer's passes alone, and no fault of either."""
    if config.max_gap is not None:
        return config.max_gap
    dropout = config.train.lora is not None and config.train.lora.dropout > 0
    return DROPOUT_GAP if dropout else MAX_GAP[policy.precision]


def _critic(context: Context[RLStage], config: RLStage, policy: Policy) -> Critic | None:
    """The critic that the recipe asks for: a head of the policy, or a model of its own or of the policy's weights."""
    asked = config.algorithm.critic
    if asked is None:
        return None
    if asked.share_trunk:
        return Critic(trainer=policy.trainer, config=asked)
    start = context.model
    model = start if asked.model is None else start.model_copy(update={"path": asked.model.path})
    train = config.train.model_copy(update={"lr": asked.lr, "muon_lr": asked.muon_lr})
    return Critic(trainer=context.world.scalar_model(model, train, reads=start), config=asked)


def _pretraining_rows(config: RLStage, model: ModelConfig, world: World) -> Gated | None:
    """The rows of PPO-ptx that pass the gate, where the recipe asks for them."""
    return None if config.algorithm.ptx is None else gate(world, model, config.train, config.algorithm.ptx.data)


def _mix(context: Context[RLStage], config: RLStage) -> PretrainingMix | None:
    data, asked = _pretraining_rows(config, context.model, context.world), config.algorithm.ptx
    if data is None or asked is None:
        return None
    context.console.say(f"{context.name}: ptx {data.describe()}")
    keep_dropped(context, "ptx", data.kept.dropped)
    return PretrainingMix(rows=data.rows, config=asked, seed=context.seed)


def check_rl(context: Context[RLStage]) -> Seen:
    """Its tasks, what its curriculum orders them by, and rows that are mixed in."""
    seen, found = look_at_tasks(context)
    hardness_of(found.tasks, context.config.curriculum)  # raises where a column has no number
    if context.config.algorithm.baseline == "same_state":
        with opened(context.config.environment, context.world) as environment:
            _check_states(context.config, environment)
    _gain(context.config, context.model, found.tasks, max_length=0)  # raises where a task has no answer
    mixed = _pretraining_rows(context.config, context.model, context.world)
    mixing = [] if mixed is None else [f"ptx {mixed.describe()}"]
    cautions = context.config.algorithm.cautions(prompts=context.config.prompts_per_step)
    largest = seen.step_tokens if mixed is None else None
    return replace(seen, summary="; ".join([seen.summary, *mixing, *cautions]), step_tokens=largest)


def needs_of_rl(config: RLStage) -> Needs:
    """A policy, a reference for the KL, and a critic."""
    kl = config.algorithm.kl
    reference = kl.place != "none" and (kl.reference or True)
    return replace(training_and_sampling(config), reference=reference, critic=config.algorithm.critic)


KIND = Kind(
    config=RLStage,
    run=run_rl,
    check=check_rl,
    needs=needs_of_rl,
    look=Look(
        charts=TRAINING,
        headline=(
            HELD_OUT_TASKS,
            ("solved", "the solved share of training tasks", percent),
            ("reward", "the reward", number),
        ),
    ),
)
