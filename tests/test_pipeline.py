"""The pipeline on real rows: every row passes the gate, every gold answer scores, and a few steps learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whet.cli.app import main
from whet.config import DataConfig
from whet.config.rewards import MathRewardConfig
from whet.envs.base import Attempt
from whet.envs.rewards.build import build_rubric
from whet.errors import RunError
from whet.files import read_json, seal, unseal
from whet.pipeline.load_data import tasks
from whet.records import Message
from whet.tracking.log import read_metrics, read_rollouts

RECIPE = """
name: real
model: "whet:tiny"
stages:
  sft:
    kind: sft
    data: {data}
    train: {{optimizer: muon, lr: 3.0e-3, batch_size: 8, steps: 5, max_length: {length}}}
"""
GSM8K_RL = """
  rl:
    kind: rl
    tasks: {{path: {path}, columns: {{prompt: question}}}}
    rewards: [{{kind: math}}]
    algorithm: grpo
    prompts_per_step: 3
    rollouts_per_prompt: 4
    sampling: {{max_tokens: 12}}
    train: {{lr: 1.0e-3, steps: 2}}
"""
ROWS = 5107
"""GSM8K problems in the shared file."""


@pytest.fixture
def whet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command in an empty folder; its JSON result."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            main([*words, "--json"])
        output, errors = capsys.readouterr()
        assert caught.value.code == 0, errors
        return json.loads(output.splitlines()[-1])

    return run


def test_gsm8k_through_sft_and_rl(shared_data: Path, whet: Callable[..., Any]) -> None:
    path = shared_data / "gsm8k" / "dev" / "train.jsonl.gz"
    data = f"{{path: {path}, columns: {{prompt: question, completion: answer}}}}"
    Path("r.yaml").write_text(RECIPE.format(data=data, length=2048) + GSM8K_RL.format(path=path))
    sft, rl = whet("check", "r.yaml")["stages"]
    assert sft["summary"].startswith(f"{ROWS:,} rows, ") and "dropped" not in sft["summary"]
    assert rl["summary"] == f"{ROWS:,} tasks"
    whet("run", "r.yaml")
    first, *_, last = read_metrics(Path("runs/real/stages/01-sft"))
    assert (first["loss"] or 0) - (last["loss"] or 0) > 1
    stage = Path("runs/real/stages/02-rl")
    assert [line["unscored"] for line in read_metrics(stage)] == [0, 0]
    assert {rollout.correct for rollout in read_rollouts(stage)} <= {True, False}
    for name in ("01-sft", "02-rl"):
        assert "model/model.safetensors" in read_json(Path("runs/real/stages", name, "manifest.json"))["files"]
        unseal(Path("runs/real/stages", name))


def test_every_gsm8k_solution_scores_one_and_another_answer_none(shared_data: Path) -> None:
    source = DataConfig(path=str(shared_data / "gsm8k" / "dev" / "train.jsonl.gz"), columns={"prompt": "question"})
    listed, dropped = tasks(source)
    assert (len(listed), dropped.total) == (ROWS, 0)
    grading = build_rubric([MathRewardConfig(kind="math")])
    try:
        grading.check(listed)
        for said, value in (("", 1.0), ("7", 0.0)):
            attempts = [
                Attempt(
                    task=task,
                    messages=(Message(role="assistant", content=str(task.columns["answer"]) + said),),
                    completion_tokens=(),
                    truncated=False,
                    max_tokens=1000,
                )
                for task in listed
            ]
            assert {score.value for score in grading.score(attempts, step=0)} == {value}
    finally:
        grading.close()


@pytest.mark.parametrize(
    ("file", "rows"),
    [("llamafactory/dev/alpaca_en_demo.jsonl.gz", 650), ("sharegpt_format/dev/dummy_conversation.jsonl", 323)],
)
def test_alpaca_and_sharegpt_through_sft(shared_data: Path, whet: Callable[..., Any], file: str, rows: int) -> None:
    Path("r.yaml").write_text(RECIPE.format(data=f"{{path: {shared_data / file}}}", length=4096))
    (sft,) = whet("check", "r.yaml")["stages"]
    assert sft["summary"].startswith(f"{rows} rows, ")
    whet("run", "r.yaml")
    first, *_, last = read_metrics(Path("runs/real/stages/01-sft"))
    assert (first["loss"] or 0) - (last["loss"] or 0) > 0.5


def test_a_sealed_folder_knows_its_damage(tmp_path: Path) -> None:
    """Another byte in a file, in the manifest's facts, or nothing at all."""
    (tmp_path / "a").write_text("one")
    (tmp_path / "b.part").write_text("cut off")
    seal(tmp_path, {"step": 3})
    assert unseal(tmp_path) == {"step": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "manifest.json"]
    manifest = (tmp_path / "manifest.json").read_text()
    for text, error in (
        (manifest.replace('"step": 3', '"step": 4'), "damaged; its SHA-256 is not the one that it states"),
        ("[1]", "holds a list, not an object"),
        (manifest[:-9], "cannot be read"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(RunError, match=error):
            unseal(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "a").write_text("two")
    with pytest.raises(RunError, match="a: damaged"):
        unseal(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(RunError, match="a: missing, though the manifest lists it"):
        unseal(tmp_path)
