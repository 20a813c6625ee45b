"""Law: a kind of stage is one record in one file, and everything that lists kinds derives from the records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from whet.cli.plan import recipe_tree
from whet.config import STAGES, SamplingConfig, Source, TrainConfig
from whet.config.budget import StageBudget, of_rows
from whet.config.loading import Loaded, load_recipe
from whet.config.stage import StageBase
from whet.config.strict import Made
from whet.envs.base import Task
from whet.errors import ConfigError, DataError, RunError
from whet.launch.check import check_recipe
from whet.launch.main import run_recipe
from whet.launch.memory import footprints
from whet.pipeline.kinds import KINDS
from whet.pipeline.load_data import conversations
from whet.pipeline.run import Run
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Needs, Seen
from whet.records import Step
from whet.tracking.charts import Chart, Curve, Look
from whet.tracking.log import RunLog, read_metrics
from whet.tracking.svg import Axis
from whet.tracking.text import number

# ------------------------------------------------------------------------------------------- a toy kind


class DecayStage(StageBase):
    """Multiplies every weight by a number, a step at a time."""

    makes: ClassVar[Made | None] = "model"
    kind: Literal["decay"]
    data: Source
    factor: float = Field(0.5, gt=0, le=1)
    train: TrainConfig = TrainConfig()

    def budget(self) -> StageBudget:
        return of_rows(self.data, self.train, answers=1)

    def unfit(self, made: Mapping[str, StageBase]) -> Iterator[str]:
        if "@first" not in made:
            yield "factor wants a stage named first before it"


def run_decay(context: Context[DecayStage]) -> None:
    config, policy = context.config, context.world.policy(context.model, context.config.train, SamplingConfig())
    parameters = policy.trainer.model.parameters.values()  # type: ignore[attr-defined]  a toy may look inside

    def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
        for index in range(start + 1, (config.train.steps or 1) + 1):
            for parameter in parameters:
                parameter.data *= config.factor
            yield Step(index=index, metrics={"size": float(sum(p.detach().abs().sum() for p in parameters))})

    drive(context, policy.trainer, RunLog(context.folder), begin, steps=config.train.steps or 1)


def check_decay(context: Context[DecayStage]) -> Seen:
    found = list(conversations(context.config.data).examples)
    return Seen(summary=f"{len(found)} rows to forget", prompts=[Task(id="1", messages=found[0].messages[:1])])


DECAY = Kind(
    config=DecayStage,
    run=run_decay,
    check=check_decay,
    needs=lambda config: Needs(train=config.train),
    look=Look(
        charts=(
            Chart(
                title="What is left",
                caption="The sum of all weights without their signs.",
                axis=Axis(label="sum", show=number),
                curves=(Curve(metric="size", label="size"),),
            ),
        ),
        headline=(("size", "what is left", number),),
    ),
)
TOYS = (*KINDS, DECAY)

# ----------------------------------------------------------------------------------------------- the law

RECIPE = """
name: toy
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
save: {every: 1}
train: {steps: 4, batch_size: 2}
stages:
  first: {kind: sft, data: {path: rows.jsonl}, train: {steps: 1}}
  less: {kind: decay, data: {path: rows.jsonl}}
  last: {kind: preference, data: {generate: arithmetic, count: 4, digits: 1}, train: {steps: 1}}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": "yes"}) + "\n" for p in "abcd"))
    return load()


def load(*words: str) -> Loaded:
    Path("toy.yaml").write_text(RECIPE)
    return load_recipe("toy.yaml", words, [kind.config for kind in TOYS])


def test_recipes_and_pipeline_know_the_same_kinds() -> None:
    assert {kind.config for kind in KINDS} == set(STAGES)


def test_a_recipe_and_a_plan_know_it(toy: Loaded) -> None:
    stage = toy.recipe.stages["less"]
    assert isinstance(stage, DecayStage) and stage.train.steps == 4, "the recipe's own `train` reaches it"
    assert str(toy.origins["stages.less.train.steps"]) == "toy.yaml:5"
    assert [(b.kind, b.steps, b.sequences) for b in toy.recipe.budgets()][1] == ("decay", 4, 2)
    assert "stages" in str(recipe_tree(toy).children[-1].label)
    with pytest.raises(ConfigError, match=r"stages.less.factr: unknown key; did you mean 'factor'"):
        load("stages.less.factr=1")
    with pytest.raises(ConfigError, match=r"must be one of .*'sft'.*got 'decay'"):
        load_recipe("toy.yaml")
    Path("toy.yaml").write_text(RECIPE.replace("first:", "other:"))
    with pytest.raises(ConfigError, match="factor wants a stage named first"):
        load_recipe("toy.yaml", (), [kind.config for kind in TOYS])
    less = footprints(Run(recipe=toy.recipe, folder=Path("run"), kinds=TOYS))[1]
    assert less.stage == "less" and less.optimizer > 0 and less.cache == 0


def test_it_is_checked_run_shown_and_gone_on_with(toy: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_recipe(toy, kinds=TOYS)[1]
    assert (check.kind, check.summary) == ("decay", "4 rows to forget")
    assert "a" in check.samples[0][0].text
    whole = run_recipe(load("out=whole"), quiet=True, kinds=TOYS)

    calls = iter(range(100))
    with monkeypatch.context() as patched:
        patched.setattr("whet.tracking.console.Console.log", lambda *_: _stop() if next(calls) == 3 else None)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load("out=broken"), quiet=True, kinds=TOYS)
    assert sorted(path.name for path in Path("broken/checkpoints/02-less").glob("step-*")) == [
        "step-00000001", "step-00000002",
    ]  # fmt: skip
    with pytest.raises(RunError, match=r"less: factor \(was 0.5 and is 0.25\)"):
        run_recipe(load("out=broken", "stages.less.factor=0.25"), quiet=True, kinds=TOYS)
    run_recipe(load("out=broken"), quiet=True, kinds=TOYS)
    sizes = [[line["size"] for line in read_metrics(Path(run, "stages", "02-less"))] for run in ("whole", "broken")]
    assert sizes[0] == sizes[1] and sizes[0][-1] == pytest.approx(sizes[0][0] / 8, rel=1e-3)
    report = Path(whole["report"]).read_text()
    assert "What is left" in report and "What is left went from" in report

    Path("rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        check_recipe(toy, kinds=TOYS)


def _stop() -> None:
    raise KeyboardInterrupt
