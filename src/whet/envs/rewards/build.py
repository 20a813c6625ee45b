"""From the `rewards` of a recipe to a rubric: the table of kinds, beside the rewards that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from whet.config import rewards as kinds
from whet.envs.base import Attempt, Grade, Reward
from whet.envs.rewards.exact import exact
from whet.envs.rewards.format import well_formed
from whet.envs.rewards.function import FunctionReward
from whet.envs.rewards.math import MathReward
from whet.envs.rewards.overlong import overlong
from whet.envs.rewards.plain import PlainReward
from whet.envs.rubric import WeightedRubric
from whet.errors import ConfigError

Verify = Callable[[Attempt], Grade]
"""A task family's own checker: of answers (1 is right) or of their steps."""


def build_rubric(
    rewards: Sequence[kinds.RewardConfig], verify: Verify | None = None, check_steps: Verify | None = None
) -> WeightedRubric:
    """The rubric that a recipe's `rewards` describe.

    `verify` and `check_steps` are the task family's checkers, for `kind: verifier` and `kind: steps`.
    A reward without a name is called after its kind, a function after itself. Raises `ConfigError` for equal names
    or a checker that the tasks do not have, `RewardError` for a function that cannot be loaded.
    """
    built: list[Reward] = []
    try:
        for config in rewards:
            built.append(_build(config, verify, check_steps))  # noqa: PERF401 - one by one: what is built so far gets closed
        return WeightedRubric(built)
    except BaseException:
        for reward in built:
            reward.close()
        raise


def _build(config: kinds.RewardConfig, verify: Verify | None, check_steps: Verify | None) -> Reward:
    name, weight = config.name or config.kind, config.weight
    match config:
        case kinds.VerifierReward():
            if verify is None:
                raise ConfigError("rewards: kind verifier is for generated tasks (generate: ...); use math or exact")
            return PlainReward(name=name, weight=weight, judges=True, function=verify)
        case kinds.StepsReward():
            if check_steps is None:
                raise ConfigError("rewards: kind steps is for tasks whose family checks them (generate: arithmetic)")
            return PlainReward(name=name, weight=weight, judges=False, function=check_steps)
        case kinds.MathReward():
            return MathReward(name=name, weight=weight, gold=config.gold, deadline_s=config.deadline_s)
        case kinds.ExactReward():
            grade = partial(exact, gold=config.gold)
            return PlainReward(name=name, weight=weight, judges=True, function=grade, columns=(config.gold,))
        case kinds.FormatReward():
            return PlainReward(name=name, weight=weight, judges=False, function=well_formed)
        case kinds.OverlongReward():
            soft = partial(overlong, cache_tokens=config.cache_tokens)
            return PlainReward(name=name, weight=weight, judges=False, function=soft)
        case kinds.FunctionReward():
            return FunctionReward(
                name=config.name or config.path.rpartition(":")[2],
                weight=weight,
                path=config.path,
                deadline_s=config.deadline_s,
                judges=config.judges,
            )
