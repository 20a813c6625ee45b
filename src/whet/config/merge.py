"""The stage of merging: several models of one shape become one, without training."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.budget import ONE_STEP, StageBudget
from whet.config.derived import section_of
from whet.config.model import ModelConfig, NamedModel
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict
from whet.formulas.merge import MERGES


class MethodSection(Strict):
    """How tensors are merged: a function of `formulas.merge`, with its constants as keys."""

    kind: str


METHODS = {
    kind: section_of(function, f"{kind}_merge", base=MethodSection, kind=kind, module=__name__)
    for kind, function in MERGES.items()
}
if TYPE_CHECKING:
    Method = MethodSection
else:
    Method = Annotated[reduce(or_, METHODS.values()), Field(discriminator="kind")]


class MergeInput(NamedModel):
    """A model that is merged, by its path alone or as a section."""

    weight: float = 1.0
    adapter: Path | None = None
    """A peft folder: this LoRA is added to the weights first."""


class MergeStage(StageBase):
    """Several models of one shape, tokenizer and chat template as one; or an adapter into its base."""

    makes: ClassVar[Made | None] = "model"
    reads_model: ClassVar[bool] = False
    kind: Literal["merge"]
    inputs: list[MergeInput] = Field(min_length=1)
    """Models by hub id, directory or `@stage`; the result has the tokenizer of the first."""
    method: Method = METHODS["linear"](kind="linear")
    """linear: a weighted mean (soup). slerp: along the arc between two. task_arithmetic, ties: sums of what each has
    learned since `base`."""
    base: NamedModel | None = None
    """What the inputs were trained from (task_arithmetic, ties)."""

    @property
    def start(self) -> ModelConfig:
        """The first input, whose tokenizer and template the result has."""
        return self.inputs[0]

    @model_validator(mode="after")
    def _check(self) -> MergeStage:
        if self.model is not None:
            raise ValueError("model has no effect on a merge; name what is merged in inputs")
        if (self.base is not None) != (self.method.kind in ("task_arithmetic", "ties")):
            raise ValueError("base goes with method: task_arithmetic or ties, which need it; the others have none")
        if self.method.kind == "slerp" and len(self.inputs) != 2:
            raise ValueError("method: slerp is between two inputs; merge more with linear, or two and two")
        if self.base is None and sum(each.weight for each in self.inputs) <= 0:
            raise ValueError("inputs: the weights of a mean must add up to more than 0")
        return self

    def budget(self) -> StageBudget:
        """One step without training."""
        return ONE_STEP
