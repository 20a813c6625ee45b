"""PPO through the pipeline: a critic that learns, is saved, and continues bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from whet.config import PolicyConfig, Recipe
from whet.launch.world import LocalWorld
from whet.pipeline.run import Run, run_recipe
from whet.pipeline.stage import Interrupted
from whet.tracking.console import Console

TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 48, "max_length": 64}


def recipe(folder: Path, **algorithm: Any) -> Run:
    stage = {
        "kind": "rl",
        "tasks": {"generate": "arithmetic", "count": 64, "digits": 1},
        "rewards": [{"kind": "format"}, {"kind": "overlong", "cache_tokens": 8}],
        "algorithm": algorithm,
        "prompts_per_step": 4,
        "rollouts_per_prompt": 2,
        "sampling": {"max_tokens": 10},
        "train": {"steps": 4, "lr": 1e-3},
    }
    model = {"path": "whet:tiny", "create": TINY}
    return Run(
        recipe=Recipe.model_validate(
            {"name": "ppo", "model": model, "stages": {"rl": stage}, "save": {"every": 1}, "threads": 1}
        ),
        folder=folder,
    )


def run(run_: Run, *, stop_after: int | None = None) -> list[dict[str, Any]]:
    looks = iter(range(1, 100))
    stopped = (lambda: next(looks) >= stop_after) if stop_after else (lambda: False)
    run_recipe(run_, LocalWorld(), Console(quiet=True), stopped, about={"threads": 1})
    lines = (run_.stage_folder("rl") / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("t") or k == "trained"} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "critic",
    [
        {"lr": 1e-3, "pretrain_steps": 1, "minibatches": 2, "scale_rewards": True},
        {"share_trunk": True},
    ],
)
def test_a_run_with_a_critic_resumes_bit_for_bit(tmp_path: Path, critic: dict[str, Any]) -> None:
    algorithm = {"preset": "ppo", "minibatches": 2, "critic": critic}
    whole, cut = recipe(tmp_path / "whole", **algorithm), recipe(tmp_path / "cut", **algorithm)
    expected = run(whole)
    with pytest.raises(Interrupted):
        run(cut, stop_after=2)
    assert run(cut) == expected
    assert weights(cut.model_folder("rl")) == weights(whole.model_folder("rl"))
    assert "value/explained_variance" in expected[-1] and "value/loss" in expected[-1]
    if "share_trunk" not in critic:
        assert expected[0]["kl"] == pytest.approx(0, abs=1e-9)  # the first step is the critic's alone
        folders = [r.model_folder("rl") / "critic" for r in (whole, cut)]
        assert weights(folders[0]) == weights(folders[1])
        loaded = AutoModelForSequenceClassification.from_pretrained(folders[0])
        assert loaded.config.num_labels == 1


def test_while_the_critic_is_pretrained_the_policy_stands_still(tmp_path: Path) -> None:
    still = recipe(tmp_path / "still", preset="ppo", critic={"lr": 1e-3, "pretrain_steps": 4})
    lines = run(still)
    assert all(line["grad_norm"] == 0 and line["ratio/log_mean"] < 1e-5 for line in lines)
    assert lines[-1]["value/loss"] < lines[0]["value/loss"]
    torch.manual_seed(0)
    start = LocalWorld().policy(
        still.recipe.model,
        still.recipe.stages["rl"].train,
        still.recipe.stages["rl"].sampling,  # type: ignore[union-attr]
    )
    start.trainer.export(tmp_path / "start")
    assert weights(tmp_path / "start") == weights(still.model_folder("rl"))


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"credit": "gae", "baseline": "none", "scale": "none"}, "needs the values of a critic"),
        ({"critic": {}}, "no effect with credit: outcome"),
        ({"preset": "ppo", "baseline": "group_mean"}, "has its baseline in the critic"),
        ({"preset": "ppo", "critic": {"share_trunk": True, "pretrain_steps": 3}}, "no critic of its own"),
    ],
)
def test_what_makes_no_sense_is_refused(axes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PolicyConfig.model_validate(axes)
