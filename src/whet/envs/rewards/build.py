"""From the `rewards` of a recipe to a rubric: the table of kinds, beside the rewards that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from whet.config import rewards as kinds
from whet.config import shaping
from whet.config.judge import JudgeConfig
from whet.envs import families
from whet.envs.base import Attempt, Grade, PlainReward, Reward, Task, require
from whet.envs.clients import Models
from whet.envs.judges.judge import Judge, build_judge
from whet.envs.rewards.code import CodeReward
from whet.envs.rewards.exact import exact, exact_gold, right_verdict
from whet.envs.rewards.function import FunctionReward
from whet.envs.rewards.graders import GraderReward
from whet.envs.rewards.instructions import check_instructions, instructions
from whet.envs.rewards.judge import EquivalenceReward, PairsReward, PointsReward
from whet.envs.rewards.math import MathReward
from whet.envs.rewards.model import Combine, ModelReward, ProcessReward
from whet.envs.rewards.rows import RowVerifier
from whet.envs.rewards.shaping import (
    GroupLength,
    calls,
    consistent,
    cosine,
    length,
    of_environment,
    of_turns,
    overlong,
    repetition,
    well_formed,
)
from whet.envs.rubric import WeightedRubric
from whet.errors import ConfigError
from whet.formulas.aggregate import pessimistic
from whet.sandbox.base import Limits
from whet.sandbox.http import open_sandbox


def build_rubric(
    rewards: Sequence[kinds.RewardConfig], family: families.Family | None = None, models: Models | None = None
) -> WeightedRubric:
    """The rubric that a recipe's `rewards` describe.

    `family` grades rewards of kind verifier, steps and worth; `models` loads judges and reward models.
    A reward without a name is called after its kind, a function after itself. Raises `ConfigError` for equal names
    or a checker that the tasks do not have, `RewardError` for a function that cannot be loaded, `SandboxError` where
    programs cannot be run safely.
    """
    built: list[Reward] = []
    try:
        for config in rewards:
            built.append(_build(config, family, models))  # noqa: PERF401 - what is built so far gets closed
        return WeightedRubric(built)
    except BaseException:
        for reward in built:
            reward.close()
        raise


PLAIN: Mapping[type[shaping.RewardBase], Callable[..., Grade]] = {
    kinds.ExactReward: exact,
    kinds.InstructionsReward: instructions,
    kinds.VerdictReward: right_verdict,
    kinds.EnvironmentReward: of_environment,
    kinds.TurnsReward: of_turns,
    kinds.CallsReward: calls,
    shaping.FormatReward: well_formed,
    shaping.LanguageReward: consistent,
    shaping.OverlongReward: overlong,
    shaping.CosineReward: cosine,
    shaping.LengthReward: length,
    shaping.RepetitionReward: repetition,
}
"""Functions of one attempt; their keyword arguments are the section's own keys."""


def _build(config: kinds.RewardConfig, family: families.Family | None, models: Models | None) -> Reward:
    named: dict[str, Any] = {"name": kinds.name_of(config), "weight": config.weight}
    own, plain = config.settings, partial(PlainReward, **named, judges=config.says_right)
    match config:
        case kinds.MathRewardConfig():
            return MathReward(**named, **own)
        case kinds.AnswerReward():
            asked = own.pop("judge")
            judge = _judge(asked, models) if asked else None
            rules = MathReward(**named, **own, words=True)
            return rules if judge is None else EquivalenceReward(**named, rules=rules, judge=judge)
        case shaping.GroupLengthReward():
            return GroupLength(**named)
        case kinds.FunctionRewardConfig():
            return FunctionReward(**named, **own, judges=config.verifies)
        case kinds.GraderRewardConfig():
            own["model"] = config.model and _models(models).chat(config.model)
            return GraderReward(**named, **own, judges=config.verifies)
        case kinds.CodeRewardConfig():
            limits = Limits(deadline_s=own.pop("deadline_s"), memory_mb=own.pop("memory_mb"), output_kb=4096)
            return CodeReward(**named, **own | {"sandbox": open_sandbox(config.sandbox)}, limits=limits)
        case kinds.JudgeReward():
            judging: dict[str, Any] = {**named, "judge": _judge(config, models)}
            if config.form == "pairs":
                return PairsReward(**judging, opponents=config.opponents)
            return PointsReward(**judging, probe=config.probe)
        case kinds.ModelRewardConfig() | kinds.EnsembleReward() | kinds.ProcessModelReward():
            return _scored(config, models)
        case kinds.VerifierReward() if family is None:
            return RowVerifier(**named, **own)
        case kinds.VerifierReward() | kinds.StepsReward() | kinds.WorthReward():
            return plain(function=_of_family(config, family))
        case _:
            return plain(function=partial(PLAIN[type(config)], **own), check_task=_check_of(config))


def _check_of(config: kinds.RewardConfig) -> Callable[[Task], object] | None:
    """What refuses a task that a plain reward cannot grade."""
    match config:
        case kinds.ExactReward():
            return partial(exact_gold, column=config.gold)
        case kinds.InstructionsReward():
            return check_instructions
        case kinds.VerdictReward():
            return partial(require, column=config.gold, reward=kinds.name_of(config))
    return None


def _of_family(
    config: kinds.VerifierReward | kinds.StepsReward | kinds.WorthReward, family: families.Family | None
) -> Callable[[Attempt], Grade]:
    """The task family's own grader. Raises `ConfigError` where the tasks have none."""
    match config:
        case kinds.VerifierReward(verifier=None) if family is not None:
            return family.verify
        case kinds.VerifierReward():
            raise ConfigError("rewards: verifier is of rows; generated tasks have their own, leave it out")
        case kinds.StepsReward() if family is not None and family.checks_steps:
            return family.check_steps
        case kinds.StepsReward():
            raise ConfigError("rewards: kind steps is for tasks whose family checks them (generate: arithmetic)")
        case _ if family is not None:
            return family.rate
    raise ConfigError("rewards: kind worth is for generated tasks (generate: ...), whose worth is known")


def _scored(
    config: kinds.ModelRewardConfig | kinds.EnsembleReward | kinds.ProcessModelReward, models: Models | None
) -> Reward:
    if models is None:
        raise ConfigError(f"reward kind {config.kind!r} needs a model provider; none was passed to build_rubric")
    shared: dict[str, Any] = {"name": kinds.name_of(config), "weight": config.weight, "deadline_s": config.deadline_s}
    if isinstance(config, kinds.ProcessModelReward):
        scorer = models.scorer(config, steps=True)
        return ProcessReward(**shared, scorer=scorer, separator=config.separator, aggregate=config.aggregate)
    asked: Sequence[kinds.ScorerConfig] = [config] if isinstance(config, kinds.ModelRewardConfig) else config.models
    combine: Combine = fmean
    if isinstance(config, kinds.EnsembleReward) and config.aggregate != "mean":
        combine = min if config.aggregate == "min" else partial(pessimistic, spread=config.spread)
    scorers = tuple(models.scorer(each, steps=False) for each in asked)
    return ModelReward(**shared, scorers=scorers, combine=combine, truncated=config.truncated)


def _judge(config: JudgeConfig, models: Models | None) -> Judge:
    return build_judge(config, _models(models).chat(config.model))


def _models(models: Models | None) -> Models:
    if models is None:
        raise ConfigError("a judge needs a model provider; none was passed to build_rubric")
    return models
