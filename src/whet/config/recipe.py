"""The recipe: one pydantic tree for YAML, the command line and Python.

Unknown keys are errors everywhere. A recipe's `model`, `train` and `sampling` sections are defaults that every
stage inherits and may override key by key (`loading.inherit`); after loading, each stage stands alone.

Defaults are published settings, named in `docs/`. Units are in the names: `_s` seconds, `_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from whet.config import rows
from whet.config.budget import StageBudget
from whet.config.distill import DistillStage
from whet.config.evaluation import EvalStage
from whet.config.loops import LoopConfig
from whet.config.machine import MachineConfig
from whet.config.merge import MergeStage
from whet.config.model import ModelConfig
from whet.config.preference import OnlinePreferenceStage, PreferenceStage
from whet.config.reward_model import RewardModelStage, unfit_rewards
from whet.config.rewards import name_of
from whet.config.rl import RLStage
from whet.config.sft import SFTStage
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict, references
from whet.config.train import SaveConfig

STAGES: tuple[type[StageBase], ...] = (
    SFTStage, PreferenceStage, OnlinePreferenceStage, RewardModelStage, RLStage, DistillStage, MergeStage, EvalStage,
    rows.CompareStage, rows.ReviseStage, rows.QuestionsStage, rows.AgreementStage, rows.StepLabelsStage,
    rows.SampleStage, rows.SelectStage,
)  # fmt: skip
"""The kinds of stages that recipes know."""
if TYPE_CHECKING:
    Stage = StageBase
else:
    Stage = Annotated[reduce(or_, STAGES), Field(discriminator="kind")]

INHERITED = ("train", "sampling")
"""Sections that a recipe file may have at its top, as defaults of its stages; they are no fields of `Recipe`."""
SHORT: Mapping[str, str] = {
    "model": "path",
    "data": "path",
    "eval_data": "path",
    "tasks": "path",
    "environment": "path",
    "decontaminate": "path",
    "algorithm": "preset",
    "loss": "preset",
    "method": "kind",
}
"""Keys of a stage whose value may be text alone, which stands for a section with this key; a recipe's `model` too."""


NOUNS: dict[Made, str] = {
    "model": "stage that makes a model",
    "reward": "reward_model stage",
    "rows": "stage that makes rows",
}
"""What a reference must name, in words."""


class Recipe(Strict):
    """One file, one pipeline: named stages in order, each starting from what the one before made."""

    free: ClassVar[frozenset[str]] = frozenset({"description", "out", "threads", "save", "trackers", "machine"})

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = 0
    out: Path | None = None
    """Run folder; None: `runs/NAME`."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads; auto: whichever of one and all cores is faster on the run's own shapes at this moment."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers of every step's metrics, beside the log files: tensorboard (`RUN/tensorboard`), W&B, trackio."""
    model: ModelConfig
    save: SaveConfig = SaveConfig()
    machine: MachineConfig = MachineConfig()
    """Where it runs (`docs/scale.md`); a file of its own may say it: `whet run recipe.yaml machine.yaml`."""
    loops: dict[str, LoopConfig] = {}
    """Groups of stages that are repeated; in `stages` they are written out round by round (`config.loops`)."""
    stages: dict[str, Stage] = Field(min_length=1)

    @property
    def folder(self) -> Path:
        """Where the run is: `out`, or else `runs/NAME`."""
        return self.out or Path("runs") / self.name

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        made: dict[Made, list[str]] = {"model": ["model"], "reward": [], "rows": []}
        earlier: dict[str, StageBase] = {}
        last = {self._last_of(loop): loop for loop in self.loops}
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
                    raise ValueError(f"stages.{name}.{key} is {path}, {self._absent(path[1:], what, made[what])}")
                written = getattr(earlier.get(path), "write", None)
                if key.startswith("data") and stage.learns_from and written not in (None, stage.learns_from):
                    raise ValueError(f"stages.{name}.{key} is {path}, which writes {written}, and {stage.kind} learns "
                                     f"from {stage.learns_from}: give that one write: {stage.learns_from}")  # fmt: skip
            asked = [*getattr(stage, "rewards", ()), *getattr(getattr(stage, "evaluation", None), "rewards", ())]
            for problem in (*unfit_rewards(asked, earlier), *stage.unfit(earlier)):
                raise ValueError(f"stages.{name}.{problem}")
            names = [name, f"{name}/best"] if getattr(stage, "best", None) is not None else [name]
            if stage.makes is not None:
                made[stage.makes] += names
            earlier |= {f"@{each}": stage for each in names}
            for what, there in made.items():
                if name in last and (maker := self.maker_in(last[name], 1, what)):
                    there += [last[name], *([f"{last[name]}/best"] if f"{maker}/best" in there else [])]
        return self

    @model_validator(mode="after")
    def _samplers_apart(self) -> Recipe:
        for name, stage in self.stages.items():
            if not isinstance(stage, RLStage):
                continue
            if stage.lag.steps and stage.sampling.server is not None and stage.lag.order == "exact":
                raise ValueError(
                    f"stages.{name}.lag.order: exact samples with past versions of the weights, which vLLM servers do "
                    "not keep; use strict or window"
                )
            if stage.lag.steps and not self.machine.samplers.replicas and stage.sampling.server is None:
                raise ValueError(
                    f"stages.{name}.lag.steps: {stage.lag.steps} samples while it trains, which needs samplers in "
                    "processes of their own; add machine: {samplers: {replicas: 1}} or vLLM servers "
                    "(sampling.server), or set lag.steps: 0"
                )
            if self.machine.samplers.replicas and stage.sampling.engine != "embedded":
                raise ValueError(
                    f"machine.samplers.replicas starts engines of our own, and stages.{name}.sampling.engine is "
                    f"{stage.sampling.engine}; use engine: embedded, or replicas: 0"
                )
        return self

    def _last_of(self, loop: str) -> str:
        """The last stage of a loop; the group must be written out, and have what its rule looks at."""
        config = self.loops[loop]
        if any(name not in self.stages for names in config.stages for name in names):
            raise ValueError(f"loops.{loop} names stages that are not there; write the group as stages.{loop}.stages")
        if config.until is not None and self.judge_of(config.stages[0]) is None:
            raise ValueError(f"loops.{loop}.until needs a stage of kind eval in the loop")
        if config.until is not None:
            judge: Any = self.stages[self.judge_of(config.stages[0]) or ""]
            known, metric = ["accuracy", *map(name_of, judge.rewards)], config.until.metric
            if metric not in known and not any(metric.startswith(f"{name}/") for name in known):
                near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(metric, known, n=1))
                raise ValueError(f"loops.{loop}.until.metric is {metric!r}, and its evaluation has "
                                 f"{', '.join(known)}{near}")  # fmt: skip
        return config.stages[-1][-1]

    def _absent(self, target: str, what: Made, there: list[str]) -> str:
        """What is wrong with a reference to something that is not there."""
        text = f"which is no earlier {NOUNS[what]}"
        if target in self.loops or (target in self.stages and self.stages[target].makes == what):
            return f"{text}: it is made later, and stages that wait for one another cannot run (a cycle)"
        if target in self.stages:
            text = f"{text}: {target} is of kind {self.stages[target].kind}"
        elif close := get_close_matches(target, there, n=1):
            return f"{text}; did you mean '@{close[0]}'?"
        return f"{text}; there is {', '.join(f'@{other}' for other in there if other != 'model') or 'none'}"

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        """The loop and the round (from 1) of each stage of a loop."""
        rounds = ((loop, n, names) for loop, each in self.loops.items() for n, names in enumerate(each.stages, start=1))
        return {name: (loop, number) for loop, number, names in rounds for name in names}

    def maker_in(self, loop: str, number: int, what: Made) -> str | None:
        """The last stage of a round of a loop that makes such."""
        names = reversed(self.loops[loop].stages[number - 1])
        return next((name for name in names if self.stages[name].makes == what), None)

    def judge_of(self, names: Sequence[str]) -> str | None:
        """Of a round's stages the evaluation that may stop its loop."""
        return next((name for name in reversed(names) if self.stages[name].evaluates is not None), None)

    @property
    def distinct(self) -> dict[str, StageBase]:
        """The stages, those of loops in their first round alone: later ones differ from it in what they read."""
        places = self.places
        return {name: stage for name, stage in self.stages.items() if places.get(name, ("", 1))[1] == 1}

    def budgets(self) -> list[StageBudget]:
        """The arithmetic of every stage, in order; behind a stage that plays held-out tasks, that of those.

        Of a loop that of its first round, and how often it is repeated.
        """
        repeats = {name: self.loops[loop].repeat for name, (loop, _) in self.places.items()}
        found = []
        for name, stage in self.distinct.items():
            times = repeats.get(name, 1)
            found.append(replace(stage.budget(), stage=name, kind=stage.kind, repeat=times))
            if (played := stage.evaluation_budget()) is not None:
                found.append(replace(played, stage=name, kind="evaluation", repeat=times))
        return found


@lru_cache(maxsize=8)
def recipe_of(stages: tuple[type[StageBase], ...]) -> type[Recipe]:
    """The model of recipes whose stages are of these kinds."""
    if stages == STAGES:
        return Recipe
    union: Any = Annotated[reduce(or_, stages), Field(discriminator="kind")]
    return create_model("Recipe", __base__=Recipe, stages=(dict[str, union], Field(min_length=1)))
