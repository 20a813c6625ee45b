"""The recipe: one pydantic tree for YAML, the command line and Python.

Unknown keys are errors everywhere. A recipe's `model`, `train` and `sampling` sections are defaults that every
stage inherits and may override key by key (`loading.inherit`); after loading, each stage stands alone.

Defaults are published settings, named in `docs/`. Units are in the names: `_s` seconds, `_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, create_model, model_validator

from whet.config.budget import StageBudget
from whet.config.evaluation import EvalStage
from whet.config.feedback import AgreementStage, CompareStage, QuestionsStage, ReviseStage, StepLabelsStage
from whet.config.model import ModelConfig
from whet.config.online_preference import OnlinePreferenceStage
from whet.config.preference import PreferenceStage
from whet.config.references import references
from whet.config.reward_model import RewardModelStage, unfit_rewards
from whet.config.rl import RLStage
from whet.config.sft import SFTStage
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict
from whet.config.train import SaveConfig

Stage = Annotated[
    SFTStage
    | PreferenceStage
    | OnlinePreferenceStage
    | RewardModelStage
    | RLStage
    | EvalStage
    | CompareStage
    | ReviseStage
    | QuestionsStage
    | AgreementStage
    | StepLabelsStage,
    Field(discriminator="kind"),
]

INHERITED = ("train", "sampling")
"""Sections that a recipe file may have at its top, as defaults of its stages; they are no fields of `Recipe`."""
SHORT: Mapping[str, str] = {
    "model": "path",
    "data": "path",
    "eval_data": "path",
    "tasks": "path",
    "environment": "path",
    "algorithm": "preset",
    "loss": "preset",
}
"""Keys of a stage whose value may be text alone, which stands for a section with this key; a recipe's `model` too."""


NOUNS: dict[Made, str] = {"model": "stage", "reward": "reward_model stage", "rows": "stage that makes rows"}
"""What a reference must name, in words."""


class Recipe(Strict):
    """One file, one pipeline: named stages in order, each starting from what the one before made."""

    free: ClassVar[frozenset[str]] = frozenset({"description", "out", "threads", "save", "trackers"})

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = 0
    out: Path | None = None
    """Run folder; None: `runs/NAME`."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads; auto: whichever of one and all cores is faster on the run's own shapes at this moment."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Who hears the numbers of every step beside the log files: tensorboard (`RUN/tensorboard`), W&B or trackio."""
    model: ModelConfig
    save: SaveConfig = SaveConfig()
    stages: dict[str, Stage] = Field(min_length=1)

    @property
    def folder(self) -> Path:
        """Where the run is: `out`, or else `runs/NAME`."""
        return self.out or Path("runs") / self.name

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        made: dict[Made, list[str]] = {"model": ["model"], "reward": [], "rows": []}
        earlier: dict[str, StageBase] = {}
        for name, stage in self.stages.items():
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"stage name {name!r} must be letters, digits, - and _")
            if name == "model":
                raise ValueError("stage name 'model' is taken: @model means what the recipe starts from")
            found = list(references(stage))
            compared = (stage.evaluates or {}).items()
            found += [(f"models.{label}", path, "model") for label, path in compared if path.startswith("@")]
            for key, path, what in found:
                if path[1:] not in made[what]:
                    there = ", ".join(f"@{other}" for other in made[what] if other != "model") or "none"
                    raise ValueError(f"stages.{name}.{key} is {path}, which is no earlier {NOUNS[what]} ({there})")
            asked = [*getattr(stage, "rewards", ()), *getattr(getattr(stage, "evaluation", None), "rewards", ())]
            for problem in (*unfit_rewards(asked, earlier), *stage.unfit(earlier)):
                raise ValueError(f"stages.{name}.{problem}")
            names = [name, f"{name}/best"] if getattr(stage, "best", None) is not None else [name]
            if stage.makes is not None:
                made[stage.makes] += names
            earlier |= {f"@{each}": stage for each in names}
        return self

    def budgets(self) -> list[StageBudget]:
        """The arithmetic of every stage, in order; behind a stage that plays held-out tasks, that of those."""
        found = []
        for name, stage in self.stages.items():
            found.append(replace(stage.budget(), stage=name, kind=stage.kind))
            if (played := stage.evaluation_budget()) is not None:
                found.append(replace(played, stage=name, kind="evaluation"))
        return found


STAGES: tuple[type[StageBase], ...] = get_args(get_args(Stage)[0])
"""The kinds of stages that recipes know."""


@lru_cache(maxsize=8)
def recipe_of(stages: tuple[type[StageBase], ...]) -> type[Recipe]:
    """The model of recipes whose stages are of these kinds."""
    if stages == STAGES:
        return Recipe
    union: Any = Annotated[reduce(or_, stages), Field(discriminator="kind")]
    return create_model("Recipe", __base__=Recipe, stages=(dict[str, union], Field(min_length=1)))
