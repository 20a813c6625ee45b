"""The order of tasks: difficulty buckets, skipped tasks, and prompts that are played again."""

from __future__ import annotations

from pydantic import Field, model_validator

from whet.config.strict import Strict

SOLVED = "solved"


class CurriculumConfig(Strict):
    """The order of an RL stage's tasks. What is measured: the share of right answers when a task was last played."""

    order_by: str | None = None
    """What makes a task hard: a column with a number (larger is harder), or `solved`, the measured share (in the first
    epoch nothing is known, so it is shuffled as ever). None: no order."""
    buckets: int = Field(4, ge=2)
    """With `order_by`: number of difficulty buckets of an epoch, easiest first; each is shuffled."""
    skip_above: float | None = Field(None, gt=0, le=1)
    """A task of which this share is right, or more, is left out for `skip_steps` steps."""
    skip_below: float | None = Field(None, ge=0, lt=1)
    """The same for this share or less: hopeless for now."""
    skip_steps: int = Field(20, ge=1)
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each step's prompts that are past ones whose answers were some right and some wrong; they are sampled
    anew."""

    @model_validator(mode="after")
    def _check(self) -> CurriculumConfig:
        low, high = self.skip_below, self.skip_above
        if self.order_by is None and low is None and high is None and not self.replay:
            raise ValueError("curriculum changes nothing; set order_by, skip_above, skip_below or replay, or remove it")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"skip_below {low} and skip_above {high} skip every task; leave room between")
        return self

    @property
    def measures(self) -> bool:
        """Whether it needs to know which answers are right."""
        return self.order_by == SOLVED or self.skip_above is not None or self.skip_below is not None or self.replay > 0
