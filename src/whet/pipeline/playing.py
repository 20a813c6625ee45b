"""What stages share that play tasks: the tasks that can be used, and who plays them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

from whet.config import ModelConfig, SamplingConfig
from whet.config.environment import EnvironmentConfig
from whet.data.faults import Dropped
from whet.envs.base import Attempt, Rubric, SingleTurn, Task
from whet.envs.endpoint.play import ProgramEnvironments
from whet.envs.rubric import WeightedRubric
from whet.envs.tools.play import Environments, OwnEnvironments, ToolEnvironments
from whet.envs.tools.user import SimulatedUsers
from whet.pipeline.load_data import rubric, tasks, usable
from whet.pipeline.stage import Context, Policy, Seen, World, keep_dropped
from whet.records import Message, Reply, Score
from whet.rollouts.curriculum import Curriculum
from whet.rollouts.feed import Feed
from whet.rollouts.ledger import AheadFeed
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams, aside
from whet.templates.base import Template

CHUNK_EPISODES = 512
"""Episodes of an evaluation that are played at once."""
SHOWN = 3
"""Prompts that a check shows."""
FORGOTTEN = (
    "after a {} turn the chat template leaves out the thinking of earlier answers: plays keep it as it was sampled, "
    "and a deployment that renders its history anew drops it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Playable:
    """The tasks of a stage, and what was left out of them."""

    tasks: Sequence[Task]
    lost: tuple[Dropped, ...]
    prompt_tokens: int
    """Of the longest prompt."""
    narrow: str = ""
    """How many prompts leave less room than an answer may have, and how much; empty where none does."""
    tools: str = ""
    """The tools that may be called, and how calls are written; empty where there are none."""
    notes: tuple[str, ...] = ()
    """What the rewards say."""

    def describe(self) -> str:
        """`5,107 tasks; 2 rows dropped: ...; 3 tasks have room for 12 to 20 of 64 tokens`."""
        dropped = (d.describe() for d in self.lost if d.any)
        return "; ".join(
            [f"{len(self.tasks):,} tasks", *dropped, *filter(None, [self.narrow, self.tools]), *self.notes]
        )


@contextmanager
def opened(config: EnvironmentConfig | None, world: World) -> Iterator[Environments | None]:
    """The environment of a stage, whose processes end with the block; None: every task is one question."""
    if config is None:
        yield None
        return
    made: Environments
    if config.kind == "endpoint":
        made = ProgramEnvironments(config)
    else:
        made = OwnEnvironments(config) if callable(config.path) else ToolEnvironments(config, users_of(config, world))
    with closing(made):
        yield made


def users_of(config: EnvironmentConfig, world: World) -> SimulatedUsers | None:
    """Who plays the users of a dialogue; None where no model does."""
    if config.user is None:
        return None
    client, most = world.chat(config.user), config.user_tokens
    one = Lock()  # training that plays ahead and an evaluation ask from threads of their own

    def ask(asked: list[tuple[Message, ...]]) -> list[Reply]:
        with one:
            return client.chat(asked, max_tokens=most)

    return SimulatedUsers(lambda asked: aside(partial(ask, asked)), client.close)


def find_tasks(
    section: Any, model: ModelConfig, world: World, grading: WeightedRubric, environment: Environments | None = None
) -> Playable:
    """The tasks of a section with `tasks` and `sampling` (of the stage, or of its evaluation), checked against the
    rewards, the model's template and the environment; loads no weights.

    Raises `DataError` where there are tools that the template cannot write.
    """
    listed, unread = tasks(section.tasks)
    template, length = world.template(model), world.max_length(model)
    kept, unusable, rooms = usable(section.tasks, listed, grading, template, length, environment)
    tools = ""
    if environment is not None and environment.tools:
        names = ", ".join(tool["function"]["name"] for tool in environment.tools)
        tools = f"tools {names}, calls as {template.dialect.name}"
    if environment is not None and environment.config.limits.turns > 1 and template.forgets:
        tools = f"{tools}; {FORGOTTEN.format(' or a '.join(template.forgets))}".removeprefix("; ")
    longest = length - min(rooms)
    lost, narrow = (unread, unusable), _narrow(rooms, section.sampling.max_tokens)
    return Playable(tasks=kept, lost=lost, prompt_tokens=longest, narrow=narrow, tools=tools, notes=grading.notes)


def tasks_of(
    context: Context[Any], grading: WeightedRubric, environment: Environments | None = None, *, each: str = ""
) -> Sequence[Task]:
    """The tasks of a stage, with what became of the others told and noted; `each`: what is made of a task, in words."""
    found = find_tasks(context.config, context.model, context.world, grading, environment)
    context.console.say(f"{context.name}: {found.describe()}{each}")
    keep_dropped(context, "tasks", found.lost)
    return found.tasks


def feed_of(
    context: Context[Any],
    policy: Policy,
    tasks: Sequence[Task],
    grading: Rubric,
    *,
    environment: Environments | None = None,
    greedy: bool = False,
    curriculum: Curriculum | None = None,
) -> Feed:
    """A feed of the policy's answers to the tasks, as many as the stage says; `greedy`: with a greedy one each."""
    config, lag = context.config, getattr(context.config, "lag", None)
    greedily = config.sampling.model_copy(update={"temperature": 0.0})
    play = player(policy, grading, config.sampling, environment)
    asked: dict[str, Any] = {
        "player": replace(play, branches=tuple(getattr(config, "branches", ()))),
        "tasks": tasks,
        "samples": config.rollouts_per_prompt,
        "steps": config.train.steps,
        "seed": context.seed,
        "hand_over": policy.hand_over,
        "greedy": player(policy, grading, greedily, environment) if greedy else None,
        "curriculum": curriculum,
    }
    if policy.apart is None or lag is None or not lag.steps:
        return Feed(**asked)
    patience = context.world.machine.deadlines.progress_s
    per_step = config.prompts_per_step
    return AheadFeed(sampler=policy.apart, lag=lag, prompts_per_step=per_step, progress_s=patience, **asked)


def _narrow(rooms: Sequence[int], max_tokens: int) -> str:
    less = [room for room in rooms if room < max_tokens]
    if not less:
        return ""
    who = "1 task has" if len(less) == 1 else f"{len(less):,} tasks have"
    room = str(min(less)) if min(less) == max(less) else f"{min(less)} to {max(less)}"
    return f"{who} room for {room} of {max_tokens} tokens"


def chunks_of(tasks: Sequence[Task], samples: int) -> list[tuple[range, Sequence[Task]]]:
    """The tasks that are played at once, and their places; between chunks a stop is looked for."""
    size = max(1, CHUNK_EPISODES // samples)
    firsts = range(0, len(tasks), size)
    return [(range(first, first + len(tasks[first : first + size])), tasks[first : first + size]) for first in firsts]


def look_at_tasks(context: Context[Any]) -> tuple[Seen, Playable]:
    """The tasks of a stage with `tasks` and `rewards`, and what a check shows of them."""
    section = getattr(context.config, "environment", None)
    with opened(section, context.world) as environment:
        found = _look(context, context.config, environment)
        held_out = _look_held_out(context, environment)
        tools = () if environment is None else environment.tools
    summary = "; ".join([found.describe(), *map(_said, held_out)])
    seen = Seen(summary=summary, prompts=found.tasks[:SHOWN], tools=tools)
    if environment is not None:
        return seen, found
    longest, config = max(each.prompt_tokens for each in (found, *held_out)), context.config
    answers = getattr(config, "rollouts_per_prompt", 0) * config.sampling.max_tokens
    most = getattr(config, "prompts_per_step", 0) * (found.prompt_tokens + answers)
    return replace(seen, prompt_tokens=longest, step_tokens=most or None), found


def evaluation_summary(context: Context[Any]) -> list[str]:
    """What a check says of the held-out tasks of a stage without an environment, where it has any."""
    return list(map(_said, _look_held_out(context, None)))


def _said(held_out: Playable) -> str:
    return f"evaluation on {held_out.describe()}"


def _look_held_out(context: Context[Any], environment: Environments | None) -> list[Playable]:
    evaluation = getattr(context.config, "evaluation", None)
    return [] if evaluation is None else [_look(context, evaluation, environment)]


def _look(context: Context[Any], section: Any, environment: Environments | None) -> Playable:
    with closing(rubric(section.tasks, section.rewards, context.world)) as grading:
        return find_tasks(section, context.model, context.world, grading, environment)


def check_tasks(context: Context[Any]) -> Seen:
    """The check of a stage that has tasks and rewards alone."""
    return look_at_tasks(context)[0]


@dataclass(frozen=True, slots=True)
class Ungraded:
    """A rubric that scores nothing, and says why."""

    why: str

    def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
        """No value."""
        return [Score(value=None, note=self.why) for _ in attempts]

    def close(self) -> None:
        """Nothing is open."""


def player(
    policy: Policy, grading: Rubric, sampling: SamplingConfig, environment: Environments | None = None
) -> Player:
    """Plays tasks with this policy, in an environment or as single questions."""
    limits = None if environment is None else environment.config.limits
    most = policy.max_length if limits is None else limits.episode_tokens or policy.max_length
    shortens = environment is not None and environment.config.kind != "endpoint"
    return Player(
        sampler=policy.sampler,
        template=policy.template,
        environment=SingleTurn if environment is None else environment.make,
        rubric=grading,
        params=sampling_params(sampling, policy.template),
        max_length=min(policy.max_length, most),
        max_turns=1 if limits is None else limits.turns,
        observation_tokens=limits.observation_tokens if limits is not None and shortens else None,
    )


def sampling_params(config: SamplingConfig, template: Template) -> SamplingParams:
    """The recipe's sampling section, with the stop tokens that the template knows."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_ids=template.stop_ids,
        stop=tuple(config.stop),
    )
