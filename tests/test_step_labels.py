"""Labels of steps from where they lead: what a scripted policy does from each prefix decides them, exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from whet.config.loading import load_recipe
from whet.config.rows import StepLabelsStage
from whet.envs.base import Attempt, Grade, PlainReward, SingleTurn, Task
from whet.envs.rubric import WeightedRubric
from whet.errors import ConfigError
from whet.launch.main import run_recipe
from whet.models.create import byte_tokenizer
from whet.pipeline.stages.step_labels import _Labels
from whet.records import Completion, Ending, Message
from whet.rollouts.play import Player
from whet.sampling.base import Request, SamplingParams
from whet.templates.jinja import JinjaTemplate

TEMPLATE = JinjaTemplate(byte_tokenizer())
ROLLOUTS = 4


class Script:
    """Answers `a;b;c!`; from `a;` one of four completions is right (ends in !), from `a;b;` none."""

    version = 0

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.seeds: list[int] = []

    async def sample(self, request: Request) -> Completion:
        self.seeds.append(request.seed)
        said = TEMPLATE.decode(list(request.prompt)).rpartition("assistant\n")[2]
        text = {"": "a;b;c", "a;": "x!" if said not in self.prompts else "x", "a;b;": "y"}[said]
        self.prompts.append(said)
        return self._completion(text)

    def _completion(self, text: str) -> Completion:
        tokens = tuple(byte_tokenizer()(f"{text}<|im_end|>")["input_ids"])
        return Completion(tokens=tokens, logprobs=(0.0,) * len(tokens), version=0, ending=Ending.STOP)


def right(attempt: Attempt) -> Grade:
    return Grade(value=float(attempt.answer.endswith("!")))


@pytest.mark.parametrize(("kind", "labels"), [("hard", [1.0, 0.0]), ("soft", [0.25, 0.0])])
def test_a_step_is_worth_what_comes_of_it(kind: str, labels: list[float]) -> None:
    config = StepLabelsStage.model_validate({
        "kind": "step_labels", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}],
        "samples": 2, "rollouts": ROLLOUTS, "labels": kind, "separator": ";",
    })  # fmt: skip
    script = Script()
    player = Player(
        sampler=script,
        template=TEMPLATE,
        environment=SingleTurn,
        rubric=WeightedRubric([PlainReward(name="right", weight=1.0, judges=True, function=right)]),
        params=SamplingParams(max_tokens=30, stop_ids=TEMPLATE.stop_ids),
        max_length=200,
    )
    task = Task(id="t", messages=(Message(role="user", content="go"),))
    made = _Labels(cast(Any, SimpleNamespace(seed=0, config=config)), player).chunk(1, [task])
    assert [row["labels"] for row in made.rows] == [labels, labels]
    assert made.rows[0]["steps"] == ["a;", "b;", "c"] and made.rows[0]["right"] is False
    assert script.prompts.count("a;") == ROLLOUTS, "two answers share their prefix, which is gone on from once"
    assert len(set(script.seeds)) == len(script.seeds) == 2 + 2 * ROLLOUTS, "each is a draw of its own"


class Mixed(Script):
    """One answer as ever, one that was cut off, one that says nothing, and one without a verdict."""

    async def sample(self, request: Request) -> Completion:
        if len(self.prompts) >= 4:
            return await super().sample(request)
        text = ("x!", "a;b", "", "?")[len(self.prompts)]
        self.prompts.append(text)
        completion = self._completion(text)
        return replace(completion, ending=Ending.LENGTH) if text == "a;b" else completion


def test_an_answer_that_says_nothing_of_its_steps_makes_no_row_and_is_counted() -> None:
    config = StepLabelsStage.model_validate({
        "kind": "step_labels", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}],
        "samples": 4, "rollouts": ROLLOUTS, "separator": ";",
    })  # fmt: skip

    def judge(attempt: Attempt) -> Grade:
        return Grade(value=None, failure="who knows") if attempt.answer == "?" else right(attempt)

    player = Player(
        sampler=Mixed(),
        template=TEMPLATE,
        environment=SingleTurn,
        rubric=WeightedRubric([PlainReward(name="right", weight=1.0, judges=True, function=judge)]),
        params=SamplingParams(max_tokens=30, stop_ids=TEMPLATE.stop_ids),
        max_length=200,
    )
    task = Task(id="t", messages=(Message(role="user", content="go"),))
    made = _Labels(cast(Any, SimpleNamespace(seed=0, config=config)), player).chunk(1, [task])
    assert [(row["steps"], row["labels"]) for row in made.rows] == [(["x!"], [1.0])]
    assert made.metrics["answers/left_out"] == 3


def test_rows_teach_a_process_reward_model(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("""
name: shepherd
model: "whet:demo"
stages:
  labels:
    kind: step_labels
    tasks: {generate: arithmetic, count: 12, digits: 1}
    rewards: [{kind: verifier}]
    samples: 2
    rollouts: 2
    chunk: 5
    sampling: {max_tokens: 16}
  prm: {kind: reward_model, data: {path: "@labels"}, learn: steps, train: {steps: 2, batch_size: 4}}
""")
    run_recipe(load_recipe(tmp_path / "r.yaml", [f"out={tmp_path}/run"]), quiet=True)
    rows = (tmp_path / "run" / "stages" / "01-labels" / "rows.jsonl").read_text().splitlines()
    assert rows and all(len(row["labels"]) <= len(row["steps"]) for row in map(json.loads, rows))
    assert (tmp_path / "run" / "stages" / "02-prm" / "model" / "config.json").exists()


def test_somebody_must_say_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("""
name: r
model: "whet:demo"
stages:
  labels: {kind: step_labels, tasks: {generate: arithmetic}, rewards: [{kind: format}]}
""")
    with pytest.raises(ConfigError, match="none says which answers are right"):
        load_recipe(tmp_path / "r.yaml")
