"""Held-out data on the way: measuring changes no bit of training, and resumes; the best model is the one it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from whet.config.held_out import BestConfig
from whet.config.loading import load_recipe
from whet.errors import ConfigError, SamplersLost
from whet.launch.world import LocalWorld
from whet.pipeline import playing
from whet.pipeline.held_out import HeldOut
from whet.pipeline.run import Run, run_recipe
from whet.pipeline.stage import Interrupted
from whet.tracking.console import Console
from whet.tracking.log import RunLog, read_metrics, read_rollouts
from whet.tracking.sinks import SINKS

MODEL = '{path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}'
TASKS = "tasks: {generate: arithmetic, count: 6, digits: 1, split: test}, samples: 2"
ROWS = "{generate: arithmetic, count: 6, digits: 1, split: test}"
OTHERS = "rewards: [{kind: language, script: LATIN}], sampling: {max_tokens: 6}"
DATA = "data: {generate: arithmetic, count: 12, digits: 1}\n    train: {steps: 5, lr: 0.02, batch_size: 4"
PLAYED = """
    tasks: {generate: arithmetic, count: 24, digits: 1}
    rewards: [{kind: language, script: LATIN}]
    prompts_per_step: 2
    rollouts_per_prompt: 3
    sampling: {max_tokens: 8}
    train: {steps: 5, lr: 0.02}
"""
STAGES = {
    "rl": (f"kind: rl{PLAYED}    algorithm: {{preset: dr_grpo, minibatches: 2}}\n", f"evaluation: {{{TASKS}}}"),
    "online": (f"kind: online_preference{PLAYED}", f"evaluation: {{{TASKS}, sampling: {{temperature: 0.9}}}}"),
    "preference": (
        f"kind: preference\n    {DATA}, lora: {{rank: 2, dropout: 0.3}}}}\n    max_reference_gap: 9\n",
        f"eval_data: {ROWS}\n    evaluation: {{{TASKS}, {OTHERS}}}",
    ),
    "sft": (
        f"kind: sft\n    {DATA}}}\n",
        f"eval_data: {ROWS}\n    evaluation: {{{TASKS}, {OTHERS}}}",
    ),
    "rm": (
        f"kind: reward_model\n    {DATA}}}\n    hold_out: 0\n",
        f"eval_data: {ROWS}",
    ),
}
BEST = {"rl": "eval_reward", "online": "eval_reward", "preference": "eval_loss", "sft": "eval_loss", "rm": "eval_loss"}
CLOCKS = ("time_s", "time/rollout", "time/score", "time/train", "tokens_per_second")


class PowerCut(Exception):
    """Nothing is saved any more."""


def recipe(folder: Path, stage: str, *more: str, overrides: tuple[str, ...] = ()) -> Any:
    text = "\n    ".join([STAGES[stage][0].rstrip(), *more])
    path = folder / "recipe.yaml"
    path.write_text(f"name: held\nmodel: {MODEL}\nsave: {{every: 2}}\nstages:\n  {stage}:\n    {text}\n")
    return load_recipe(path, overrides).recipe


def run(recipe: Any, folder: Path, stopped: Callable[[], bool] = lambda: False) -> Path:
    """The stage's folder, after a run to the end (or until something is raised)."""
    run_recipe(Run(recipe=recipe, folder=folder), LocalWorld(), Console(quiet=True), about={}, stopped=stopped)
    return folder / "stages" / f"01-{next(iter(recipe.stages))}"


def lines(stage: Path) -> list[dict[str, float | None]]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(stage)]


def trained(stage: Path) -> list[dict[str, float | None]]:
    """The lines of training, without what is held out."""
    return [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines(stage) if line["step"]]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def everything(stage: Path) -> Any:
    kept = {name: weights(stage / name) for name in ("model", "best") if (stage / name).exists()}
    played = stage / "evaluation"
    return lines(stage), kept, lines(played), read_rollouts(played)


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_the_same_bits_with_and_without(stage: str, tmp_path: Path) -> None:
    plain = run(recipe(tmp_path, stage), tmp_path / "plain")
    extra = (STAGES[stage][1], "eval_every: 2", f"best: {{metric: {BEST[stage]}}}")
    measured = run(recipe(tmp_path, stage, *extra), tmp_path / "measured")
    assert trained(measured) == trained(plain)
    assert weights(measured / "model") == weights(plain / "model")
    found = [(line["step"], line[BEST[stage]]) for line in read_metrics(measured) if BEST[stage] in line]
    assert [step for step, _ in found] == [0, 2, 4, 5]
    assert len({value for _, value in found}) > 1
    if stage != "rm":
        assert len(read_rollouts(measured / "evaluation")) == 4 * 6 * 2


@pytest.mark.parametrize("stage", ["rl", "preference"])
def test_a_run_that_was_stopped_in_an_evaluation_goes_on_with_it(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playing, "CHUNK_EPISODES", 4)  # three chunks, and a stop is looked for before each
    asked = recipe(tmp_path, stage, STAGES[stage][1], "eval_every: 2", f"best: {{metric: {BEST[stage]}}}")
    whole, count = run(asked, tmp_path / "whole"), [0]

    def until(last: int, then: Callable[[], bool]) -> Callable[[], bool]:
        count[0] = 0

        def stopped() -> bool:
            count[0] += 1
            return count[0] >= last and then()

        return stopped

    def stop() -> bool:
        return True

    def power_cut() -> bool:
        raise PowerCut

    def lost() -> bool:
        raise SamplersLost("no sampler is left")

    expected = everything(whole)
    # Before the first step, after the second, after the last: each time in the middle of what is measured.
    for last, then in ((4, stop), (8, stop), (8, lost), (17, stop), (17, power_cut)):
        folder = tmp_path / f"{last}-{then.__name__}"
        with pytest.raises((Interrupted, PowerCut, SamplersLost)):
            run(asked, folder, until(last, then))
        if (last, then) == (8, lost):  # the step itself is not
            assert [line["step"] for line in read_metrics(folder / "stages" / f"01-{stage}")] == [0, 1, 2]
        assert everything(run(asked, folder)) == expected


def test_the_best_is_the_model_of_its_step(tmp_path: Path) -> None:
    rate, more = "stages.sft.train.lr=0.3", (f"eval_data: {ROWS}", "eval_every: 1")
    asked = recipe(tmp_path, "sft", *more, "best: {metric: eval_loss}", overrides=(rate,))
    stage = run(asked, tmp_path / "run")
    found = {line["step"]: line["eval_loss"] for line in read_metrics(stage)}
    best = min(found, key=lambda step: found[step] or 0)
    assert 0 < (best or 0) < 5, "a test of something that is neither the first nor the last"
    shorter = recipe(tmp_path, "sft", overrides=(rate, f"stages.sft.train.steps={best:.0f}"))
    assert weights(stage / "best") == weights(run(shorter, tmp_path / "shorter") / "model") != weights(stage / "model")


def test_early_stopping_ends_after_its_patience(tmp_path: Path) -> None:
    best = "best: {metric: eval_loss, min_delta: 1000, patience: 2}"
    stage = run(recipe(tmp_path, "sft", f"eval_data: {ROWS}", "eval_every: 1", best), tmp_path / "run")
    assert [line["step"] for line in lines(stage)] == [0, 1, 2]
    plain = run(recipe(tmp_path, "sft", overrides=("stages.sft.train.steps=2",)), tmp_path / "plain")
    assert weights(stage / "model") == weights(plain / "model")


def look_at(values: list[float], **config: Any) -> HeldOut:
    given: Any = SimpleNamespace(best=BestConfig(metric="eval_loss", **config))
    measures = [lambda step: {"loss": values[step]}]
    found = HeldOut(given, 9, measures)
    for step in range(len(values)):
        before = HeldOut(given, 9, measures)
        assert before.restore({**found.state, "own": 1.0}) == {"own": 1.0}
        assert repr(before.state) == repr(found.state)
        found.look(step)
    return found


def test_what_is_better() -> None:
    found = look_at([2.0, 1.0, 1.0, 1.5, nan], patience=3)
    assert (found.best_step, found.over) == (1, "no eval_loss better than 1 (step 1) in 3 evaluations")
    found = look_at([2.0, 1.0, 1.0, 1.5, nan, 0.9], patience=4)
    assert (found.best_step, found.over) == (5, "")
    assert look_at([2.0, 1.8, 1.5], min_delta=0.3).best_step == 2
    assert look_at([2.0, 1.0, 3.0], goal="max").best_step == 2
    assert look_at([nan, nan, 3.0, nan]).best_step == 2
    assert BestConfig(metric="eval_solved").better(0.5, 0.4)


def test_a_line_is_amended_in_place(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.amend(0, {"eval_loss": 2.0})
    log.write(1, {"loss": 1.0, "solved": nan})
    log.amend(1, {"eval_loss": 0.5})
    log.write(2, {"loss": 0.5})
    log.close()
    found = [{k: v for k, v in line.items() if k != "time_s"} for line in read_metrics(tmp_path)]
    assert found == [
        {"step": 0, "eval_loss": 2.0},
        {"step": 1, "loss": 1.0, "solved": None, "eval_loss": 0.5},
        {"step": 2, "loss": 0.5},
    ]


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("rl", ["best: {metric: eval_reward}"], "best.metric is of held-out data.*add evaluation"),
        ("sft", ["best: {metric: eval_loss}"], "add eval_data or evaluation"),
        ("sft", ["eval_data: " + ROWS, "best: {metric: loss}"], r"best\.metric"),
        ("sft", ["evaluation: {" + TASKS + "}"], r"evaluation\.rewards: missing"),
        ("rl", ["evaluation: {" + TASKS + ", sampling: {engine: vllm}}"], "the engine is the stage's own"),
        ("rl", ["evaluation: {" + TASKS + ", rewards: [{kind: group_length}]}"], "no reward judges"),
        ("rl", ["evaluation: {" + TASKS + ", sample: 2}"], "did you mean 'samples'"),
        ("rl", ["eval_steps: 3"], "'eval_every' here"),
        ("rl", ["early_stopping_patience: 3"], r"'best\.patience' here"),
    ],
)
def test_what_cannot_be_meant_is_refused(stage: str, more: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(tmp_path, stage, *more)


def test_the_best_of_a_stage_that_keeps_none_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    stage = "{kind: sft, data: {generate: arithmetic}, eval_data: {generate: arithmetic, split: test}%s}"
    kept = ", best: {metric: eval_loss}"
    for extra, found in (("", False), (kept, True)):
        second = "{kind: sft, model: '@a/best', data: {generate: arithmetic}}"
        path.write_text(f"name: two\nmodel: whet:demo\nstages:\n  a: {stage % extra}\n  b: {second}\n")
        if found:
            plan = Run(recipe=load_recipe(path).recipe, folder=tmp_path)
            assert plan.model_of("b").path == str(tmp_path / "stages/01-a/best") and plan.reads("b") == {"a"}
        else:
            with pytest.raises(ConfigError, match=r"b\.model is @a/best, which is no earlier stage"):
                load_recipe(path)


def test_trackers_hear_of_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[tuple[str, int], dict[str, float]] = {}

    class Listens:
        def __init__(self, _: object) -> None: ...

        def log(self, stage: str, step: int, metrics: dict[str, float], groups: object) -> None:
            heard[stage, step] = metrics

        def close(self) -> None: ...

    monkeypatch.setitem(SINKS, "trackio", Listens)
    path = tmp_path / "recipe.yaml"
    held = f"eval_data: {ROWS}, eval_every: 2, best: {{metric: eval_loss}}"
    path.write_text(f"""
name: heard
model: {MODEL}
trackers: [trackio]
stages:
  sft: {{kind: sft, {DATA.replace(chr(10), ",")}}}, {held}}}
  eval:
    kind: eval
    models: {{start: "@model", best: "@sft/best"}}
    {TASKS.replace(", samples", chr(10) + "    samples")}
    rewards: [{{kind: verifier}}]
    sampling: {{max_tokens: 6}}
""")
    run(load_recipe(path).recipe, tmp_path / "run")
    assert {step for stage, step in heard if stage == "sft"} == {0, 1, 2, 3, 4, 5}
    assert "eval_loss" in heard["sft", 0] and "eval_loss" in heard["sft", 4] and "eval_loss" not in heard["sft", 3]
    told = heard["eval", 1]
    assert {"accuracy/start", "accuracy/best", "gain/best"} <= told.keys() and "gain/start" not in told


def test_a_metric_of_no_evaluation_is_found_before_the_first_step(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "rl", STAGES["rl"][1], "best: {metric: eval_rewrd}")
    with pytest.raises(ConfigError, match=r"no evaluation measures 'eval_rewrd'; did you mean 'eval_reward'"):
        run(asked, tmp_path / "run")
    assert not (tmp_path / "run/stages/01-rl/metrics.jsonl").exists()


def test_its_cost_is_in_the_plan(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "rl", STAGES["rl"][1], "eval_every: 2")
    training, played = asked.budgets()
    assert (training.kind, played.kind, played.steps) == ("rl", "evaluation", 4)
    assert (played.prompts, played.sequences, played.tokens_each) == (6, 12, 8)
    assert json.loads(asked.model_dump_json())["stages"]["rl"]["evaluation"]["sampling"]["max_tokens"] == 8
