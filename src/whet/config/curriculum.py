"""Which tasks come next, where that is more than a shuffle: pools of difficulty, rests, and past prompts again."""

from __future__ import annotations

from pydantic import Field, model_validator

from whet.config.strict import Strict

SOLVED = "solved"


class CurriculumConfig(Strict):
    """The order of an RL stage's tasks. What is measured: the share of right answers when a task was last played."""

    by: str | None = None
    """What makes a task hard: a column with a number (larger is harder), or `solved`, the measured share (in the first
    epoch nothing is known, so it is shuffled as ever). None: no order."""
    pools: int = Field(4, ge=2)
    """With `by`: each epoch's tasks are cut into so many pools, easiest first; tasks of a pool are shuffled."""
    rest_above: float | None = Field(None, gt=0, le=1)
    """A task of which this share is right, or more, is left out for `rest_steps` steps."""
    rest_below: float | None = Field(None, ge=0, lt=1)
    """The same for this share or less: hopeless for now."""
    rest_steps: int = Field(20, ge=1)
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each step's prompts that are past ones whose answers were some right and some wrong; they are sampled
    anew."""

    @model_validator(mode="after")
    def _check(self) -> CurriculumConfig:
        low, high = self.rest_below, self.rest_above
        if self.by is None and low is None and high is None and not self.replay:
            raise ValueError("curriculum changes nothing; set by, rest_above, rest_below or replay, or leave it out")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"rest_below is {low} and rest_above {high}, so every task would rest; leave room between")
        return self

    @property
    def measures(self) -> bool:
        """Whether it needs to know which answers are right."""
        return self.by == SOLVED or self.rest_above is not None or self.rest_below is not None or self.replay > 0
