"""What every stage of a recipe has: its keys, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self, get_args

from pydantic import model_validator

from whet.config.budget import StageBudget
from whet.config.model import ModelConfig
from whet.config.strict import Made, Strict


class StageBase(Strict):
    """What every stage has. A kind of stage is a subclass with its own `kind: Literal[NAME]`."""

    makes: ClassVar[Made | None] = None
    """What later stages may refer to as `@name`; None: nothing. A stage that makes a model hands it to the next."""
    learns_from: ClassVar[str | None] = None
    """What the rows of a `select` stage must be (`write`) for its `data`; None: it learns from no such rows."""
    reads_model: ClassVar[bool] = True
    """Whether what it makes follows from the model that it starts from."""

    kind: str
    model: ModelConfig | None = None
    """None: what the stage before made, or the recipe's model for the first."""

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        train = getattr(self, "train", None)
        if self.kind != "sft" and train is not None and train.neftune is not None:
            raise ValueError("train.neftune is for SFT: other stages compare passes, which noise makes different")
        return self

    @classmethod
    def kind_name(cls) -> str:
        """What recipes call the kind."""
        (name,) = get_args(cls.model_fields["kind"].annotation)
        return str(name)

    @property
    def start(self) -> ModelConfig | None:
        """The model that its keys name; None: it starts from what came before it."""
        return self.model

    @property
    def evaluates(self) -> Mapping[str, str] | None:
        """The paths of the models that it compares, by label; None: that is not what it does."""
        return None

    def budget(self) -> StageBudget:
        """What it costs at most, as far as its keys say."""
        return StageBudget()

    def evaluation_budget(self) -> StageBudget | None:
        """What it costs at most to play held-out tasks on the way; None: it plays none."""
        return None

    def unfit(self, made: Mapping[str, StageBase]) -> Iterator[str]:
        """What is wrong with how it uses the artifacts of earlier stages, by `@name`; each begins with a key."""
        yield from ()
