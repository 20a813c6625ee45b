"""The rewards of a recipe, one section for each kind; `envs.rewards.build` turns them into a rubric."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_origin

from pydantic import Field, field_validator, model_validator

from whet.config import shaping
from whet.config.graders import Grader, MultiGrader, ScoreModel
from whet.config.judge import ChatConfig, JudgeConfig
from whet.config.model import ModelConfig
from whet.config.shaping import RewardBase
from whet.config.strict import Made, PythonObject

SANDBOXES = ("auto", "strong", "default", "agentic", "minimal")


class RightReward(RewardBase):
    """A reward whose value of 1 means that the answer is right."""

    @property
    def says_right(self) -> bool:
        """Always."""
        return True


class VerifierReward(RightReward):
    """1 if the checker of the task's own kind accepts the answer: of its family, or of the data set that it is from."""

    kind: Literal["verifier"] = "verifier"
    verifier: Literal[
        "math", "answer", "exact", "instructions", "reasoning_gym", "knights_knaves", "constraints", "zebra", "grid",
        "sudoku", "countdown",
    ] | None = None  # fmt: skip
    """Of rows: who checks them. None: what their column `verifier` says; known data sets get it by their columns."""


class InstructionsReward(RightReward):
    """1 if all of IFEval's or IFBench's instructions in the row are followed (instruction_id_list, kwargs)."""

    kind: Literal["instructions"]
    loose: bool = False
    """Whether an answer also follows what it follows without its first or last line, or its stars (IFEval's loose)."""
    share: bool = False
    """Give the share of the instructions that are followed instead."""


class StepsReward(RewardBase):
    """Grades each written step of a worked answer, and the answer as the last one (arithmetic); adds to no score."""

    grades_steps = True
    kind: Literal["steps"]


class EnvironmentReward(RightReward):
    """What the stage's environment says that the play was worth: its `reward`."""

    kind: Literal["environment"]


class TurnsReward(RewardBase):
    """The sum of the environment's rewards of single turns: its `turn_reward`."""

    kind: Literal["turns"]
    progress: bool = False
    """`turn_reward` says how far the play is: a turn is rewarded with what it changed, and nothing can be collected."""
    smear: float = Field(0.0, ge=0, le=1)
    """With `progress`: a change is shared with the turns before it, each one this part of the next one's share."""

    @model_validator(mode="after")
    def _check(self) -> TurnsReward:
        if self.smear and not self.progress:
            raise ValueError("smear shares what changed with the turns before; set progress: true")
        return self


class CallsReward(RewardBase):
    """The number of calls, tried ones included: with a negative weight what they cost."""

    kind: Literal["calls"]


class GoldReward(RightReward):
    """A reward that compares the final answer with a gold one, exactly (algebra in a process with a deadline)."""

    gold: str = "answer"
    """Column with the gold answer; `#### 42`, `\\boxed{42}` and `42` are understood."""
    deadline_s: float = Field(2.0, gt=0)
    """For one answer that takes algebra; one that takes longer is wrong if the gold itself does not."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """Relative error that a number may have; 0: none beyond the rounding of a decimal."""


class MathRewardConfig(GoldReward):
    """1 if the final answer equals the gold one mathematically; golds must be mathematics."""

    kind: Literal["math"]


class EquivalenceJudge(JudgeConfig):
    """A judge that is asked whether two answers say the same, in both orders."""

    criteria: str = "Decide whether two answers to what was asked say the same."

    @model_validator(mode="after")
    def _check_keys(self) -> EquivalenceJudge:
        for key in ("scale", "disagreement", "clamp", "visible"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of judges of how good an answer is; leave it out")
        return self


class AnswerReward(GoldReward):
    """1 if the final answer is the gold one, of any type: number with unit, choice, name, date, yes or no, formula.

    The gold column may list several, any of which counts.
    """

    kind: Literal["answer"]
    judge: EquivalenceJudge | None = None
    """Decides where the gold is words that the answer does not repeat, and nowhere else (`judged`, `judged_right`)."""


class ExactReward(RightReward):
    """1 if the final answer equals the gold one as text, spaces and case aside."""

    kind: Literal["exact"]
    gold: str = "answer"


class CodeRewardConfig(RightReward):
    """1 if the program in the answer passes all tests of the row, which is run in a sandbox on their inputs alone."""

    kind: Literal["code"]
    partial: bool = False
    """The share of tests that it passes, instead of all or nothing."""
    deadline_s: float = Field(10.0, gt=0)
    """For each run: all calls of a task together, or one input."""
    memory_mb: int = Field(512, ge=64)
    tolerance: float = Field(0.0, ge=0, lt=1)
    """Relative error of a decimal, in values and in printed output."""
    sandbox: str = "auto"
    """auto (strong, else default), strong, default, agentic; minimal, which stops nothing; or the address of a
    SandboxFusion server."""

    @field_validator("sandbox")
    @classmethod
    def _check_sandbox(cls, value: str) -> str:
        if value not in SANDBOXES and not value.startswith(("http://", "https://")):
            near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(value, SANDBOXES, n=1))
            raise ValueError(f"must be {', '.join(SANDBOXES)} or the http:// address of a server{near}")
        return value


class FunctionRewardConfig(RewardBase):
    """A Python function with the signature of TRL, verl, OpenRLHF or reasoning-gym, in its own process."""

    kind: Literal["function"]
    path: PythonObject
    """`file.py:function` or `module:function`; from Python also the function itself, which runs in this process."""
    args: dict[str, Any] | None = None
    """What `path` names is called with these and returns the function (a factory), or is a class that makes it."""
    deadline_s: float = Field(30.0, gt=0)
    verifies: bool = False
    """Whether a value of 1 means that the answer is right, or the function only shapes."""

    @property
    def says_right(self) -> bool:
        """As the recipe says."""
        return self.verifies


class GraderRewardConfig(RewardBase):
    """One of OpenAI's grader objects, as its JSON has it."""

    kind: Literal["grader"]
    grader: Grader
    model: ChatConfig | None = None
    """Who is asked by `score_model`: `{base_url: ..., model: ...}`, `{path: ...}` or `{script: ...}`."""
    max_tokens: int = Field(1024, ge=1)
    """Most tokens of what it writes."""
    deadline_s: float = Field(30.0, gt=0)
    verifies: bool = False
    """Whether a value of 1 means that the answer is right, or it only shapes."""

    @model_validator(mode="after")
    def _check_model(self) -> GraderRewardConfig:
        parts = self.grader.graders.values() if isinstance(self.grader, MultiGrader) else [self.grader]
        if any(isinstance(part, ScoreModel) for part in parts) != (self.model is not None):
            raise ValueError("model says who is asked by a grader of type score_model; give it with one, and only then")
        return self

    @property
    def says_right(self) -> bool:
        """As the recipe says."""
        return self.verifies


class JudgeReward(RewardBase, JudgeConfig):
    """What a judge thinks of the answer, from -1 (worst) to 1 (best): AI feedback without a reward model (d-RLAIF)."""

    kind: Literal["judge"]
    form: Literal["points", "pairs"] = "points"
    """points: each answer alone, on `scale`. pairs: its win rate against other answers to the same task."""
    opponents: int | None = Field(None, ge=1)
    """pairs: answers that each is compared with; None: all of its group."""
    probe: bool = True
    """points: whether one empty phrase a step is judged as well, whose score should be low (metric `probe`)."""

    @model_validator(mode="after")
    def _check_form(self) -> JudgeReward:
        if self.form == "points" and self.opponents is not None:
            raise ValueError("opponents is for form: pairs")
        return self


class VerdictReward(RightReward):
    """1 if the answer ends with the right verdict: training a judge on questions of a `questions` stage."""

    kind: Literal["verdict"]
    gold: str = "verdict"
    """Column with the right verdict."""


class WorthReward(RewardBase):
    """What an answer to a generated task is truly worth, from 0 to 1; with weight 0 it is watched and not rewarded."""

    kind: Literal["worth"]


class ScorerConfig(ModelConfig):
    """A reward model: `path` is a sequence classifier, or `@stage` for what a stage made."""

    refers_to: ClassVar[Made | None] = "reward"
    objectives: dict[str, float] = {}
    """Of a model of several objectives without a gate: what a standard deviation of each counts for; 0 and what is left
    out is only watched. Empty: the model has one score, or a gate that weighs."""


class ScoredReward(RewardBase):
    """What all rewards by reward models have."""

    deadline_s: float = Field(600.0, gt=0)
    """For all answers of a step; what is not scored by then counts as failed."""


class ModelRewardConfig(ScoredReward, ScorerConfig):
    """What a reward model says of the whole answer, in its own template and tokens."""

    kind: Literal["model"]
    truncated: float | None = None
    """Value of an answer that was cut off; None: its score, as if it had ended there."""


class EnsembleReward(ScoredReward):
    """Several reward models, and less than they say where they disagree: the policy has left what they know."""

    kind: Literal["ensemble"]
    models: list[ScorerConfig] = Field(min_length=2)
    aggregate: Literal["pessimistic", "min", "mean"] = "pessimistic"
    """pessimistic: mean - `spread` x standard deviation."""
    spread: float = Field(1.0, gt=0)
    truncated: float | None = None
    """As in `model`."""


class ProcessModelReward(ScoredReward, ScorerConfig):
    """What a process reward model says of each step, from 0 to 1, and of the answer by `aggregate`."""

    grades_steps = True
    kind: Literal["process_model"]
    separator: str = Field("\n", min_length=1)
    """Ends a step, as in what the model learned from; white space alone is no step."""
    aggregate: Literal["min", "product", "last", "mean"] = "min"

    @model_validator(mode="after")
    def _check_scorer(self) -> ProcessModelReward:
        if self.objectives:
            raise ValueError("objectives are of whole answers; use kind: model")
        return self


KINDS = [
    each
    for module in (globals(), vars(shaping))
    for each in list(module.values())
    if isinstance(each, type) and issubclass(each, RewardBase) and each.__module__ == module["__name__"]
    if get_origin(each.model_fields["kind"].annotation) is Literal
]
"""Every class of this file and of `shaping` with a kind of its own."""
if TYPE_CHECKING:
    RewardConfig = RewardBase
else:
    RewardConfig = Annotated[reduce(or_, KINDS), Field(discriminator="kind")]


def verified() -> list[RewardConfig]:
    """The rewards of a recipe that names none: the tasks' own checker."""
    return [VerifierReward()]


def name_of(reward: RewardConfig) -> str:
    """What a reward is called: as the recipe says, else after its kind, a function after itself."""
    path = reward.path if isinstance(reward, FunctionRewardConfig) else reward.kind
    own = path.rpartition(":")[2] if isinstance(path, str) else getattr(path, "__name__", type(path).__name__)
    return reward.name or own


def weights(rewards: Sequence[RewardConfig]) -> dict[str, float]:
    """The weights of what counts for something in the score, by name; objectives (`model/NAME`) one by one."""
    found: dict[str, float] = {}
    for reward in rewards:
        if isinstance(reward, ModelRewardConfig) and reward.objectives:
            found |= _objectives(reward)
        elif not isinstance(reward, StepsReward):  # which gives grades of steps alone: it is no part of the score
            found[name_of(reward)] = reward.weight
    return {name: weight for name, weight in found.items() if weight}


def _objectives(reward: ModelRewardConfig) -> dict[str, float]:
    """What each objective counts for in the score, by its name among the rewards."""
    return {f"{name_of(reward)}/{name}": reward.weight * weight for name, weight in reward.objectives.items()}


def scorers(rewards: Sequence[RewardConfig]) -> list[ScorerConfig]:
    """The reward models that are asked; each mention is a copy."""
    asked = [each for r in rewards for each in (r.models if isinstance(r, EnsembleReward) else [r])]
    return [each for each in asked if isinstance(each, ScorerConfig)]


def check_cost(cost: str, rewards: Sequence[RewardConfig]) -> None:
    """Raise `ValueError` where a constraint's cost is no reward and no objective, or counts in the score as well."""
    found = {name_of(reward): reward.weight for reward in rewards if not isinstance(reward, StepsReward)}
    for reward in rewards:
        found |= _objectives(reward) if isinstance(reward, ModelRewardConfig) else {}
    if cost in [name_of(reward) for reward in rewards if isinstance(reward, StepsReward)]:
        raise ValueError(f"constraint.cost is {cost!r}, which grades steps and no answers")
    if cost not in found:
        raise ValueError(f"constraint.cost is {cost!r}, which is none of the rewards: {', '.join(found)}")
    if found[cost]:
        raise ValueError(f"constraint.cost is {cost!r}, whose weight counts it in the score too; give it weight: 0")


def judged(rewards: Sequence[RewardConfig]) -> bool:
    """Whether some reward says which answers are right."""
    return any(reward.says_right for reward in rewards)


def check_normalised(rewards: Sequence[RewardConfig]) -> None:
    """Raise `ValueError` where rewards that are normalised one by one would pass over one of their settings."""
    if any(isinstance(r, ModelRewardConfig) and r.objectives and r.truncated is not None for r in rewards):
        raise ValueError(
            "rewards: truncated is a value of the sum, and algorithm.objectives: normalised takes the objectives of a "
            "reward model one by one; leave truncated out"
        )


def check_rewards(rewards: Sequence[RewardConfig], *, max_tokens: int, environment: bool = False) -> None:
    """Raise `ValueError` where a reward lacks what it asks for: a verdict of another, an environment, some length."""
    played = [r.kind for r in rewards if isinstance(r, EnvironmentReward | TurnsReward | CallsReward)]
    if played and not environment:
        raise ValueError(f"rewards: kind {played[0]} is about an environment, and the stage has none; add environment")
    for reward in rewards:
        reward.check_length(max_tokens)
    asking = [r.kind for r in rewards if r.asks_right]
    if asking and not judged(rewards):
        raise ValueError(
            f"rewards: kind {asking[0]} asks which answers are right, and no reward judges that; "
            "add one that does (verifier, math, exact)"
        )
