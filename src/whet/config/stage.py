"""What every stage of a recipe has."""

from __future__ import annotations

from typing import ClassVar

from whet.config.model import ModelConfig
from whet.config.strict import Made, Strict


class StageBase(Strict):
    """What every stage has."""

    makes: ClassVar[Made | None] = None
    """What later stages may refer to as `@name`; None: nothing. A stage that makes a model hands it to the next."""

    model: ModelConfig | None = None
    """None: what the stage before made, or the recipe's model for the first."""

    @property
    def reads_model(self) -> bool:
        """Whether what it makes follows from `model`."""
        return True
