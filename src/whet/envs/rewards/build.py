"""From the `rewards` of a recipe to a rubric: the table of kinds, beside the rewards that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from whet.config import rewards as kinds
from whet.config import shaping
from whet.config.judge import JudgeConfig
from whet.envs.base import Attempt, Grade, Reward, Task
from whet.envs.clients import Models
from whet.envs.judges.judge import Judge, build_judge
from whet.envs.rewards.code import CodeReward
from whet.envs.rewards.environment import calls, of_environment, of_turns
from whet.envs.rewards.equivalence import EquivalenceReward
from whet.envs.rewards.exact import exact, exact_gold
from whet.envs.rewards.format import consistent, well_formed
from whet.envs.rewards.function import FunctionReward
from whet.envs.rewards.graders import GraderReward
from whet.envs.rewards.instructions import check_instructions, instructions
from whet.envs.rewards.judge import PairsReward, PointsReward
from whet.envs.rewards.length import GroupLength, cosine, length, repetition
from whet.envs.rewards.math import MathReward
from whet.envs.rewards.model import Combine, ModelReward, ProcessReward
from whet.envs.rewards.overlong import overlong
from whet.envs.rewards.plain import PlainReward, require
from whet.envs.rewards.rows import RowVerifier
from whet.envs.rewards.verdict import right_verdict
from whet.envs.rubric import WeightedRubric
from whet.errors import ConfigError
from whet.formulas.aggregate import pessimistic
from whet.sandbox.base import Limits
from whet.sandbox.http import open_sandbox

Verify = Callable[[Attempt], Grade]
"""A task family's own checker: of answers (1 is right) or of their steps."""


def build_rubric(
    rewards: Sequence[kinds.RewardConfig],
    verify: Verify | None = None,
    check_steps: Verify | None = None,
    models: Models | None = None,
    worth: Verify | None = None,
) -> WeightedRubric:
    """The rubric that a recipe's `rewards` describe.

    `verify`, `check_steps` and `worth` are the task family's own, for rewards of kind verifier, steps and worth;
    `models` brings to life whom judges ask, and reward models.
    A reward without a name is called after its kind, a function after itself. Raises `ConfigError` for equal names
    or a checker that the tasks do not have, `RewardError` for a function that cannot be loaded, `SandboxError` where
    programs cannot be run safely.
    """
    built: list[Reward] = []
    try:
        for config in rewards:
            built.append(_build(config, verify, check_steps, models, worth))  # noqa: PERF401 - what is built so far gets closed
        return WeightedRubric(built)
    except BaseException:
        for reward in built:
            reward.close()
        raise


def _build(
    config: kinds.RewardConfig,
    verify: Verify | None,
    check_steps: Verify | None,
    models: Models | None,
    worth: Verify | None,
) -> Reward:
    name, weight, judges = kinds.name_of(config), config.weight, config.says_right
    match config:
        case kinds.MathRewardConfig() | kinds.AnswerReward():
            judge = _asked(config.judge, models) if isinstance(config, kinds.AnswerReward) and config.judge else None
            rules = MathReward(
                name=name,
                weight=weight,
                gold=config.gold,
                deadline_s=config.deadline_s,
                tolerance=config.tolerance,
                words=isinstance(config, kinds.AnswerReward),
            )
            return rules if judge is None else EquivalenceReward(name=name, weight=weight, rules=rules, judge=judge)
        case shaping.GroupLengthReward():
            return GroupLength(name=name, weight=weight)
        case kinds.FunctionRewardConfig():
            return FunctionReward(
                name=name,
                weight=weight,
                path=config.path,
                args=config.args,
                deadline_s=config.deadline_s,
                judges=judges,
            )
        case kinds.GraderRewardConfig():
            return GraderReward(
                name=name, weight=weight, grader=config.grader, deadline_s=config.deadline_s, judges=judges
            )
        case kinds.CodeRewardConfig():
            return CodeReward(
                name=name,
                weight=weight,
                sandbox=open_sandbox(config.sandbox),
                limits=Limits(deadline_s=config.deadline_s, memory_mb=config.memory_mb, output_kb=4096),
                partial=config.partial,
                tolerance=config.tolerance,
            )
        case kinds.EnvironmentReward():
            return PlainReward(name=name, weight=weight, judges=judges, function=of_environment)
        case kinds.VerifierReward() if verify is None:
            return RowVerifier(name=name, weight=weight, verifier=config.verifier)
        case kinds.JudgeReward():
            return _judge(config, models)
        case kinds.ModelRewardConfig() | kinds.EnsembleReward() | kinds.ProcessModelReward():
            return _scored(config, models)
        case _:
            function, check = _plain(config, verify, check_steps, worth)
            return PlainReward(name=name, weight=weight, judges=judges, function=function, check_task=check)


Shaping = (
    kinds.StepsReward
    | shaping.FormatReward
    | shaping.LanguageReward
    | shaping.OverlongReward
    | shaping.CosineReward
    | shaping.LengthReward
    | shaping.RepetitionReward
    | kinds.TurnsReward
    | kinds.CallsReward
)
Judging = kinds.ExactReward | kinds.VerifierReward | kinds.InstructionsReward | kinds.VerdictReward | kinds.WorthReward


def _plain(
    config: Shaping | Judging, verify: Verify | None, check_steps: Verify | None, worth: Verify | None
) -> tuple[Verify, Callable[[Task], object] | None]:
    """A function of one attempt, and one that refuses a task which it cannot grade."""
    match config:
        case kinds.ExactReward():
            return partial(exact, gold=config.gold), partial(exact_gold, column=config.gold)
        case kinds.InstructionsReward():
            return partial(instructions, loose=config.loose, share=config.share), check_instructions
        case kinds.VerdictReward():
            check = partial(require, column=config.gold, reward=kinds.name_of(config))
            return partial(right_verdict, gold=config.gold), check
        case kinds.VerifierReward():
            if config.verifier is not None:
                raise ConfigError("rewards: verifier is of rows; generated tasks have their own, leave it out")
            return _checker(verify, "rows have their own"), None
        case kinds.WorthReward():
            return _checker(worth, "kind worth is for generated tasks (generate: ...), whose worth is known"), None
        case _:
            return _shaping(config, check_steps), None


def _shaping(config: Shaping, check_steps: Verify | None) -> Verify:
    """A function of one attempt that does not judge."""
    match config:
        case kinds.StepsReward():
            return _checker(check_steps, "kind steps is for tasks whose family checks them (generate: arithmetic)")
        case shaping.FormatReward():
            return partial(well_formed, form=config.form)
        case shaping.LanguageReward():
            return partial(consistent, script=config.script, thinking=config.thinking)
        case shaping.OverlongReward():
            return partial(overlong, cache_tokens=config.cache_tokens)
        case shaping.CosineReward():
            return partial(cosine, right=config.right, wrong=config.wrong, exceeded=config.exceeded)
        case shaping.LengthReward():
            return partial(length, above_tokens=config.above_tokens)
        case shaping.RepetitionReward():
            return partial(repetition, ngram=config.ngram)
        case kinds.TurnsReward():
            return of_turns
        case kinds.CallsReward():
            return calls


def _checker(checker: Verify | None, who: str) -> Verify:
    if checker is None:
        raise ConfigError(f"rewards: {who}")
    return checker


def _scored(
    config: kinds.ModelRewardConfig | kinds.EnsembleReward | kinds.ProcessModelReward, models: Models | None
) -> Reward:
    name, weight = kinds.name_of(config), config.weight
    if models is None:
        raise ConfigError(f"reward kind {config.kind!r} needs a model provider; none was passed to build_rubric")
    if isinstance(config, kinds.ProcessModelReward):
        return ProcessReward(
            name=name,
            weight=weight,
            scorer=models.scorer(config, steps=True),
            separator=config.separator,
            aggregate=config.aggregate,
            deadline_s=config.deadline_s,
        )
    asked = config.models if isinstance(config, kinds.EnsembleReward) else [config]
    return ModelReward(
        name=name,
        weight=weight,
        scorers=tuple(models.scorer(each, steps=False) for each in asked),
        combine=_combine(config) if isinstance(config, kinds.EnsembleReward) else fmean,
        truncated=config.truncated,
        deadline_s=config.deadline_s,
    )


def _combine(config: kinds.EnsembleReward) -> Combine:
    match config.aggregate:
        case "min":
            return min
        case "mean":
            return fmean
        case "pessimistic":
            return partial(pessimistic, spread=config.spread)


def _judge(config: kinds.JudgeReward, models: Models | None) -> Reward:
    name, weight, judge = kinds.name_of(config), config.weight, _asked(config, models)
    if config.form == "pairs":
        return PairsReward(name=name, weight=weight, judge=judge, opponents=config.opponents)
    return PointsReward(name=name, weight=weight, judge=judge, probe=config.probe)


def _asked(config: JudgeConfig, models: Models | None) -> Judge:
    if models is None:
        raise ConfigError("a judge needs a model provider; none was passed to build_rubric")
    return build_judge(config, models.chat(config.model))
