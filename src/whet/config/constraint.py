"""A constraint on what a policy may cost: one of the named rewards held at a limit by a Lagrange multiplier."""

from __future__ import annotations

from pydantic import Field, model_validator

from whet.config.strict import Strict


class ConstraintConfig(Strict):
    """The mean of a reward named `cost` is to be at most `limit`; what it is charged with moves until it is."""

    cost: str
    """Name of the reward: the more of it the worse. It has weight 0, for it is counted here."""
    limit: float
    proportional: float = Field(10.0, ge=0)
    """K_P: what each unit of mean cost - limit adds to the multiplier in its own step; it keeps it from swinging."""
    integral: float = Field(0.2, ge=0)
    """K_I: what each unit adds for good, step after step. Alone it is the textbook's multiplier, which swings."""
    initial_multiplier: float = Field(0.0, ge=0)
    """Initial value of the integral: what one unit of cost is worth in units of reward, if that is known."""
    max_multiplier: float = Field(100.0, gt=0)
    """The multiplier's bound, for a limit that cannot be kept."""

    @model_validator(mode="after")
    def _check(self) -> ConstraintConfig:
        if self.initial_multiplier > self.max_multiplier:
            raise ValueError(
                f"initial_multiplier is {self.initial_multiplier}, above max_multiplier ({self.max_multiplier})"
            )
        if not self.proportional and not self.integral:
            raise ValueError(
                "proportional and integral are both 0, so the price never moves; for a fixed price give the reward a "
                "weight below 0 and leave constraint out"
            )
        return self
