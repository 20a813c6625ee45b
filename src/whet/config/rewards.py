"""The rewards of a recipe, one section for each kind; `envs.rewards.build` turns them into a rubric."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from whet.config.strict import Strict


class RewardBase(Strict):
    """A named part of the reward: `weight` times what it returns is added to the score."""

    name: str | None = None
    weight: float = 1.0

    @property
    def grades_steps(self) -> bool:
        """Whether it may grade the steps of an answer, which `credit: process` and `step_weight` need."""
        return False


class VerifierReward(RewardBase):
    """The task family's own checker (generated tasks)."""

    kind: Literal["verifier"]


class StepsReward(RewardBase):
    """Grades each written step of a worked answer, and the answer as the last one (arithmetic); adds to no score."""

    kind: Literal["steps"]

    @property
    def grades_steps(self) -> bool:
        """Nothing else."""
        return True


class MathReward(RewardBase):
    """1 if the final answer equals the gold one mathematically (math-verify, in a process with a deadline)."""

    kind: Literal["math"]
    gold: str = "answer"
    """Column with the gold answer; `#### 42`, `\\boxed{42}` and `42` are understood."""
    deadline_s: float = Field(5.0, gt=0)


class ExactReward(RewardBase):
    """1 if the final answer equals the gold one as text, spaces and case aside."""

    kind: Literal["exact"]
    gold: str = "answer"


class FormatReward(RewardBase):
    """1 if the completion is `<think>...</think><answer>...</answer>` and nothing else (DeepSeek-R1)."""

    kind: Literal["format"]


class OverlongReward(RewardBase):
    """Soft overlong punishment (DAPO eq. 13): 0 up to `max_tokens - cache_tokens`, then down to -1."""

    kind: Literal["overlong"]
    cache_tokens: int = Field(ge=1)


class FunctionReward(RewardBase):
    """A function in a Python file with TRL's signature, run in its own process with a deadline."""

    kind: Literal["function"]
    path: str
    """`file.py:function`."""
    deadline_s: float = Field(30.0, gt=0)
    judges: bool = False
    """Whether a value of 1 means that the answer is right, or the function only shapes."""


RewardConfig = Annotated[
    VerifierReward | StepsReward | MathReward | ExactReward | FormatReward | OverlongReward | FunctionReward,
    Field(discriminator="kind"),
]
