"""Several objectives and a gate: trained, judged against what needs no gate, and read as a reward with its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.test_ratings import STAGE, TRAIN, rows
from tests.test_reward_model import MODEL
from whet.config import RewardModelStage
from whet.config.loading import load_recipe
from whet.config.rewards import ModelRewardConfig, ScorerConfig, weights
from whet.envs.clients import Passage, ScoreReading
from whet.errors import ConfigError, ModelError
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld
from whet.pipeline.reward_dataset import reward_dataset
from whet.records import Message

RL = """
  rl:
    kind: rl
    model: "@model"
    tasks: {generate: arithmetic, count: 8, digits: 1}
    rewards: [REWARDS]
    prompts_per_step: 2
    rollouts_per_prompt: 2
    sampling: {max_tokens: 6}
    train: {lr: 0.01, steps: 2}
"""
GATED = """{kind: model, path: "@gate"}, {kind: worth, weight: 0}"""
FIXED = (
    """{kind: model, name: fixed, path: "@ratings", weight: 2, objectives: {polite: 0.5, brief: 0}}, {kind: format}"""
)
GATE = """
  gate:
    kind: reward_model
    gate: {path: "@ratings", hidden: 8, temperature: 1}
    data: {path: DATA/pairs.jsonl}
    hold_out: 0.3
    train: {lr: 0.05, batch_size: 40, steps: 60}
"""
COSTS = "    algorithm: dr_grpo\n    constraint: {cost: fixed/COST, limit: 0}"
PPO = '    algorithm: {preset: ppo, minibatches: 1, critic: {model: "@ratings"}}'


def pairs(count: int = 240) -> list[dict[str, str]]:
    """Those who are `in haste` want few letters, whatever they are; the others want politeness."""
    made = []
    for i in range(count):
        short, long = f"{('please', 'no')[i // 2 % 2]} x", f"{('please', 'no')[i // 4 % 2]} {'x' * 10}"
        polite, rude = f"please {'x' * (i % 7)}", f"no {'x' * (i % 5)}"
        chosen, rejected = (short, long) if i % 2 else (polite, rude)
        made.append({"prompt": f"{('At ease', 'In haste')[i % 2]} {i}", "chosen": chosen, "rejected": rejected})
    return made


def recipe(folder: Path, stages: str) -> Path:
    rated = rows(300)
    for row in rated:
        row["ratings"]["brief"] = -row["ratings"].pop("long")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    learn = STAGE.replace("long", "brief") + TRAIN
    ratings = f"  ratings:\n    kind: reward_model\n    data: {{path: {folder}/rows.jsonl}}\n    {learn}\n"
    path = folder / "r.yaml"
    path.write_text(f"name: r\nmodel: {MODEL}\nstages:\n{ratings}{stages.replace('DATA', str(folder))}")
    return path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    fixed = RL.replace("rl:", "gdpo:", 1).replace("REWARDS", FIXED)
    path = recipe(
        folder,
        GATE
        + RL.replace("REWARDS", GATED)
        + fixed
        + "    algorithm: gdpo\n    constraint: {cost: fixed/brief, limit: 0, initial_multiplier: 1}\n",
    )
    run_recipe(load_recipe(path, [f"out={folder}/run"]), quiet=True)
    return folder / "run" / "stages"


def read(path: Path, prompt: str, answer: str, objectives: Mapping[str, float] | None = None) -> ScoreReading:
    scorer = LocalWorld().scorer(ScorerConfig(path=str(path / "model"), objectives=dict(objectives or {})), steps=False)
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=answer))
    (found,) = scorer.read([Passage(messages=turns, ends=(len(answer),))])
    return found


def test_the_gate_beats_every_fixed_mixture_where_the_prompt_decides(stages: Path) -> None:
    found = json.loads((stages / "02-gate" / "reward.json").read_text())
    assert found["accuracy"]["mean"] > 0.9
    assert len(found["rivals"]) == 3 and {"all objectives alike", "the best fixed mixture"} < set(found["rivals"])
    assert all(rival["gain"]["low"] > 0 for rival in found["rivals"].values())
    assert found["baseline"]["mean"] < 0.6
    report = (stages.parent / "report.html").read_text()
    assert "the best fixed mixture" in report and "gain over it" in report


def test_it_is_read_as_it_was_trained_with_every_objective_and_every_weight(stages: Path) -> None:
    ease, haste = (read(stages / "02-gate", prompt, "please xxxx") for prompt in ("At ease 500", "In haste 501"))
    assert set(ease.parts) == {"polite", "brief", "gate/polite", "gate/brief"}
    for reading in (ease, haste):
        assert reading.parts["gate/polite"] + reading.parts["gate/brief"] == pytest.approx(1, abs=1e-5)
    assert ease.parts["gate/polite"] > haste.parts["gate/polite"] + 0.2
    alone = read(stages / "01-ratings", "At ease 500", "please xxxx", {"polite": 2, "brief": -1})
    assert alone.parts["polite"] == pytest.approx(ease.parts["polite"], abs=1e-5), "the heads are as they were"
    assert alone.scores[0] == pytest.approx(2 * alone.parts["polite"] - alone.parts["brief"])


def test_it_is_saved_without_pickle_and_the_head_loads_elsewhere(stages: Path) -> None:
    folder = stages / "02-gate" / "model"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja", ".md"}
    module, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert module.config.id2label == {0: "polite", 1: "brief"}
    assert module.config.whet_reward["gate"] == {"hidden": 8, "temperature": 1.0, "debias": None}
    assert set(module.config.whet_reward["ratings"]) == {"polite", "brief"}
    (folder / "gate.safetensors").rename(folder / "away")
    try:
        with pytest.raises(ModelError, match="its gate could not be loaded"):
            read(stages / "02-gate", "p", "a")
    finally:
        (folder / "away").rename(folder / "gate.safetensors")


def test_what_is_debiased_is_chosen_on_taught_answers_by_what_the_gate_s_own_model_says(
    stages: Path, tmp_path: Path
) -> None:
    model = str(stages / "01-ratings" / "model")
    gate = GATE.replace("@ratings", model).replace("temperature: 1", "debias: length").replace("60}", "1}")
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {MODEL}\nstages:\n{gate.replace('DATA', str(stages.parents[1]))}"
    )
    loaded = load_recipe(tmp_path / "r.yaml", [f"out={tmp_path}/run"])
    run_recipe(loaded, quiet=True)
    config = loaded.recipe.stages["gate"]
    assert isinstance(config, RewardModelStage) and config.gate is not None
    given = reward_dataset(LocalWorld(), config.gate.alone(), config)
    taught, all_of_them = (
        fmean(length for lesson in part for length in lesson.lengths)
        for part in (given.taught, [*given.taught, *given.held_out])
    )
    saved = load_file(tmp_path / "run" / "stages" / "01-gate" / "model" / "gate.safetensors")
    assert saved["centre"].item() == pytest.approx(taught, abs=1e-3) and abs(taught - all_of_them) > 0.01


def test_every_objective_and_every_weight_is_logged_on_its_own(stages: Path) -> None:
    gated = json.loads((stages / "03-rl" / "metrics.jsonl").read_text().splitlines()[-1])
    named = {"", "/polite", "/brief", "/gate/polite", "/gate/brief"}
    assert {f"rewards/model{name}" for name in named} <= set(gated)
    assert {"rewards/worth/right", "rewards/worth/worked", "rewards/worth/brief"} <= set(gated)
    first, last = (json.loads(x) for x in (stages / "04-gdpo" / "metrics.jsonl").read_text().splitlines())
    assert last["rewards/fixed"] == pytest.approx(0.5 * last["rewards/fixed/polite"], abs=1e-6)
    assert (first["constraint/multiplier"] > 1) == (first["rewards/fixed/brief"] > 0), "the cost is the objective"


def test_each_objective_is_a_reward_of_its_own_where_rewards_are_normalised() -> None:
    reward = ModelRewardConfig(kind="model", path="x", weight=2, objectives={"a": 0.5, "b": -1, "c": 0})
    assert weights([reward]) == {"model/a": 1.0, "model/b": -2.0}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (GATE.replace("temperature: 1", "debias: size"), "'size': neither length nor one of polite, brief"),
        (GATE.replace("data:", "model: '@model'\n    data:"), "leave model out"),
        (GATE + GATE.replace("gate:", "more:", 1).replace("@ratings", "@gate"), "which is not rated by several"),
        (GATE.replace("hold_out", "learn: outcomes\n    hold_out"), "gate learns from comparisons"),
        (GATE.replace("lr: 0.05", "lora: {rank: 2}"), "gate leaves the model as it is"),
        (RL.replace("REWARDS", '{kind: model, path: "@ratings"}'), "no gate; say in objectives what"),
        (RL.replace("REWARDS", FIXED.replace("polite", "kind")), "@ratings has no objective 'kind'; it has polite"),
        (GATE + RL.replace("REWARDS", FIXED.replace("@ratings", "@gate")), "@gate has a gate that weighs"),
        (RL.replace("REWARDS", FIXED) + COSTS.replace("COST", "polite"), "counts"),
        (RL.replace("REWARDS", FIXED) + COSTS.replace("COST", "kind"), "none of"),
        (RL.replace("REWARDS", FIXED.replace("weight: 2", "truncated: 0")) + "    algorithm: gdpo", "truncated"),
        (RL.replace("REWARDS", "{kind: format}") + PPO, "one number"),
        (RL.replace("REWARDS", '{kind: process_model, path: "@ratings", objectives: {brief: 1}}'), "use kind"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(stages: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe(tmp_path, stages))


@pytest.mark.parametrize(
    ("stage", "objectives", "message"),
    [
        ("01-ratings", {}, "has several objectives and no gate; say in objectives what counts how much"),
        ("01-ratings", {"kind": 1.0}, "has no objective 'kind'; it has polite, brief"),
        ("02-gate", {"polite": 1.0}, "has a gate that weighs its objectives; leave objectives out"),
    ],
)
def test_a_model_from_elsewhere_is_refused_when_it_is_read(
    stages: Path, stage: str, objectives: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(stages / stage, "p", "a", objectives)
