"""What the health monitor of an RL stage watches for, where each line is drawn, and what is done about it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Action = Literal["ignore", "warn", "lower", "stop"]
"""warn: a line. lower: the learning rate times `lower_by`. stop: the run ends."""


class HealthConfig(BaseModel):
    """Lines are drawn through averages over about `window` steps; nothing is found in the first `window` steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    window: int = Field(5, ge=1)
    lower_by: float = Field(0.5, gt=0, lt=1)

    collapse: Action = "warn"
    collapse_below: float = Field(0.5, gt=0, lt=1)
    """The solved share (the reward, where nothing judges) is below this part of its best, which was above 0.02."""

    entropy_loss: Action = "warn"
    entropy_below: float = Field(0.1, gt=0, lt=1)
    """Entropy has fallen below this part of its first value, and less than 0.9 is solved: nothing is tried any more."""

    length_runaway: Action = "warn"
    truncated_above: float = Field(0.5, gt=0, lt=1)
    """More answers than this are cut off, and more than twice as many as at first."""

    no_signal: Action = "warn"
    equal_above: float = Field(0.95, gt=0, lt=1)
    """The share of groups whose rewards are all equal."""

    far_from_reference: Action = "warn"
    kl_above: float = Field(1.0, gt=0)
    """Nats per token, where a KL is measured."""

    clipping: Action = "warn"
    clipped_above: float = Field(0.3, gt=0, lt=1)
    """The share of tokens whose gradient is stopped. GSPO clips about 0.15 when all is well."""

    gap: Action = "warn"
    gap_above: float = Field(0.05, gt=0)
    """Mean |sampler - trainer| log-probability difference; `max_gap` of the stage ends the run."""

    gradient: Action = "warn"
    gradient_above: float = Field(20.0, gt=1)
    """Times the average norm so far, in one step."""
