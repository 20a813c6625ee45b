"""The RL stage: tasks, rewards, a feed, and the policy gradient between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from whet.algorithms.critic import Critic
from whet.algorithms.policy import first_state, policy_gradient
from whet.algorithms.ptx import PretrainingMix
from whet.algorithms.standing import Setting
from whet.config import (
    CompareStage,
    CurriculumConfig,
    EvalStage,
    ModelConfig,
    OnlinePreferenceStage,
    RLStage,
    SamplingConfig,
    StepLabelsStage,
)
from whet.config.rewards import weights
from whet.data.faults import Dropped
from whet.envs.base import Rubric, Task
from whet.envs.rubric import WeightedRubric
from whet.envs.single_turn import SingleTurn
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.loop import Saved, WayBack, WithCritic, drive
from whet.pipeline.sft_stage import gate
from whet.pipeline.sources import rubric, tasks, usable
from whet.pipeline.stage import Context, Policy, World
from whet.records import Step
from whet.rollouts.curriculum import Curriculum, hardness_of
from whet.rollouts.feed import Feed
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams
from whet.templates.base import Template
from whet.tracking.log import RunLog
from whet.training.tokenize import Gated


def run_rl(context: Context) -> None:
    """Sample, score, weigh and step until the steps are done."""
    config = context.config
    assert isinstance(config, RLStage) and config.train.steps is not None
    grading = rubric(config.tasks, config.rewards, context.world)
    try:
        problems = playable(config, context.model, context.world, grading)
        context.console.say(f"{context.name}: {problems.describe()}")
        keep_dropped(context, "tasks", problems.lost)
        mix = _mix(context, config)
        policy = context.world.policy(
            context.model,
            config.train,
            config.sampling,
            reference=config.algorithm.kl.place != "none",
            with_value=config.algorithm.shares_trunk,
        )
        context.console.say(f"{context.name}: {policy.about}")
        critic = _critic(context, config, policy)
        greedy = player(policy, grading, config.sampling.model_copy(update={"temperature": 0.0}))
        feed = Feed(
            player=player(policy, grading, config.sampling),
            tasks=problems.tasks,
            samples=config.rollouts_per_prompt,
            steps=config.train.steps,
            seed=context.seed,
            hand_over=policy.hand_over,
            greedy=greedy if config.algorithm.baseline == "greedy" else None,
            curriculum=_curriculum(config.curriculum, problems.tasks),
        )
        setting = Setting(
            config=config.algorithm,
            train=config.train,
            steps=config.train.steps,
            prompts_per_step=config.prompts_per_step,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            max_gap=config.max_gap,
            weights=weights(config.rewards),
            constraint=config.constraint,
            health=config.health,
            seed=context.seed,
            mix=mix,
        )
        first = first_state(setting, feed)

        def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
            feed.restore(state or first)
            return policy_gradient(policy.trainer, feed, setting, critic=critic, start=start, state=state)

        log = RunLog(context.folder, policy.template.decode)
        learning: Saved = policy.trainer
        if critic is not None and critic.trainer is not policy.trainer:
            learning = WithCritic(policy.trainer, critic.trainer)
        way_back = None
        if "back" in config.health.model_dump().values():
            way_back = WayBack(every=config.health.window, first=first)
        drive(context, learning, log, begin, steps=setting.steps, way_back=way_back)
    finally:
        grading.close()


def _curriculum(config: CurriculumConfig | None, listed: Sequence[Task]) -> Curriculum | None:
    if config is None:
        return None
    return Curriculum(config=config, tasks=len(listed), hardness=hardness_of(listed, config))


def _critic(context: Context, config: RLStage, policy: Policy) -> Critic | None:
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


def pretraining_rows(config: RLStage, model: ModelConfig, world: World) -> Gated | None:
    """The rows of PPO-ptx that pass the gate, where the recipe asks for them."""
    return None if config.algorithm.ptx is None else gate(world, model, config, config.algorithm.ptx.data)


def _mix(context: Context, config: RLStage) -> PretrainingMix | None:
    data, asked = pretraining_rows(config, context.model, context.world), config.algorithm.ptx
    if data is None or asked is None:
        return None
    context.console.say(f"{context.name}: ptx {data.describe()}")
    keep_dropped(context, "ptx", data.kept.dropped)
    return PretrainingMix(rows=data.rows, config=asked, seed=context.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Playable:
    """The tasks of a stage, and what was left out of them."""

    tasks: Sequence[Task]
    lost: tuple[Dropped, ...]

    def describe(self) -> str:
        """`5,107 tasks; 2 rows dropped: ...`."""
        return "; ".join([f"{len(self.tasks):,} tasks", *(d.describe() for d in self.lost if d.total)])


def playable(
    config: RLStage | OnlinePreferenceStage | EvalStage | CompareStage | StepLabelsStage,
    model: ModelConfig,
    world: World,
    grading: WeightedRubric,
) -> Playable:
    """The stage's tasks, checked against its rewards and the model's template; no weights are loaded for it."""
    listed, unread = tasks(config.tasks)
    kept, unusable = usable(config.tasks, listed, grading, world.template(model), world.max_length(model))
    if isinstance(config, RLStage):
        hardness_of(kept, config.curriculum)  # raises where a column has no number
    return Playable(tasks=kept, lost=(unread, unusable))


def player(policy: Policy, grading: Rubric, sampling: SamplingConfig) -> Player:
    """Plays single-turn tasks with this policy."""
    return Player(
        sampler=policy.sampler,
        template=policy.template,
        environment=SingleTurn,
        rubric=grading,
        params=sampling_params(sampling, policy.template),
        max_length=policy.max_length,
    )


def sampling_params(config: SamplingConfig, template: Template) -> SamplingParams:
    """The recipe's sampling section, with the stop tokens that the template knows."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_ids=template.stop_ids,
    )
