"""The preference stage: from rows to a model, with a reference that is computed once; and real comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from whet.config.loading import load_recipe
from whet.config.preference import OnlinePreferenceStage, PreferenceStage
from whet.errors import ConfigError, DataError, RunError
from whet.launch.check import check_recipe
from whet.launch.main import run_recipe
from whet.pipeline.reference import largest_gap
from whet.tracking.log import read_metrics

MODEL = {
    "path": "whet:tiny",
    "create": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16},
}
GENERATED = {"generate": "arithmetic", "count": 8, "digits": 2}


def write(folder: Path, stage: dict[str, Any]) -> Path:
    stage = {"kind": "preference", "data": GENERATED, **stage}
    stage["train"] = {"steps": 2, "batch_size": 4, "lr": 1e-3, **stage.get("train", {})}
    recipe = {"name": "p", "model": MODEL, "out": str(folder / "run"), "stages": {"p": stage}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def trained(folder: Path, **stage: Any) -> list[dict[str, Any]]:
    run_recipe(load_recipe(write(folder, stage)), quiet=True)
    return [dict(line) for line in read_metrics(folder / "run" / "stages" / "01-p")]


def test_how_far_the_reference_may_be_follows_from_the_precision() -> None:
    def largest(precision: str, **keys: Any) -> float:
        stage = PreferenceStage.model_validate({"kind": "preference", "data": GENERATED, "train": {"steps": 1}, **keys})
        return largest_gap(stage, SimpleNamespace(precision=precision))  # type: ignore[arg-type]

    assert (largest("float32"), largest("bfloat16")) == (0.02, 0.1)
    assert largest("bfloat16", max_reference_gap=0.3) == 0.3
    assert largest("float32", reference={"path": "whet:demo"}) == math.inf


def test_dpo_begins_at_log_two_and_learns_the_order(tmp_path: Path) -> None:
    lines = trained(tmp_path, eval_data=GENERATED, eval_every=4, train={"steps": 24, "lr": 0.01})
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["reference/gap"] < 1e-6
    assert lines[-1]["loss"] < 0.2 and lines[-1]["eval_rewards/accuracies"] > 0.8
    assert [line["step"] for line in lines if "eval_rewards/accuracies" in line] == [4, 8, 12, 16, 20, 24]
    artifact = tmp_path / "run" / "stages" / "01-p" / "reference"
    assert sorted(path.name for path in artifact.rglob("*.safetensors")) == ["00000.safetensors"] * 2


def test_without_a_reference_none_is_computed(tmp_path: Path) -> None:
    lines = trained(tmp_path, loss="simpo")
    assert "reference/gap" not in lines[0] and not (tmp_path / "run" / "stages" / "01-p" / "reference").exists()


def test_adapters_have_their_reference_for_nothing(tmp_path: Path) -> None:
    lines = trained(tmp_path, train={"lora": {"rank": 2, "dropout": 0.5}})
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "a new adapter adds nothing, whatever is dropped"


def test_rows_that_changed_under_a_checkpoint_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows.write_text("".join(json.dumps({**pair, "chosen": str(i)}) + "\n" for i in range(8)))
    path = write(tmp_path, {"data": {"path": str(rows)}, "train": {"steps": 3}})
    with monkeypatch.context() as patched:
        patched.setattr("whet.pipeline.runner._Saver.consider", _save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(path), quiet=True)
    rows.write_text(rows.read_text().replace('"7"', '"8"'))
    with pytest.raises(RunError, match=r"p: data .*rows.jsonl has changed: 8 other rows.*--accept p.data"):
        run_recipe(load_recipe(path), quiet=True)
    rows.write_text(rows.read_text().replace('"8"', '"7"'))
    run_recipe(load_recipe(path), quiet=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "stages" / "01-p")] == [1, 2, 3]


def _save_then_stop(self: Any, step: Any) -> None:
    self.save(step)
    raise KeyboardInterrupt


def test_the_gate_says_what_pulls_and_what_is_longer(tmp_path: Path) -> None:
    rows = tmp_path / "judged.jsonl"
    labels = [True, True, True, False]
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "x", "label": x}) + "\n" for i, x in enumerate(labels))
    )
    (check,) = check_recipe(load_recipe(write(tmp_path, {"data": {"path": str(rows)}, "loss": "kto"})))
    assert "4 judged answers" in check.summary
    assert "3 good and 1 bad answers pull with 3 to 1, outside KTO's 1 to 1.5" in check.summary
    rows.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x", "label": True}) + "\n" for i in range(3)))
    (check,) = check_recipe(load_recipe(write(tmp_path, {"data": {"path": str(rows)}, "loss": "kto"})))
    assert "all 3 answers are good" in check.summary
    assert "there are no bad answers" in check.summary and "nan" not in check.summary
    (check,) = check_recipe(load_recipe(write(tmp_path, {})))
    assert "8 comparisons of 16 answers" in check.summary and "the longer one is preferred in" in check.summary
    assert len(check.samples) == 6 and any(part.trained for part in check.samples[0])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"loss": "dpoo"}, "did you mean 'dpo'"),
        ({"loss": {"preset": ["dpo"]}}, r"loss.preset: must be .*, got \['dpo'\]"),
        ({"loss": {"dpo": {"bta": 1}}}, "did you mean 'beta'"),
        ({"loss": {"preset": "dpo", "dpo": None}}, "no loss is left"),
        ({"loss": {"kto": {}, "nll": {}}}, "kto is of single answers"),
        ({"loss": {"dpo": {"smoothing": 0.5}}}, "below 0.5"),
        ({"loss": "aot", "data": {**GENERATED, "answers": 3}}, "set pairs: best_worst"),
        ({"data": {**GENERATED, "plain": True}}, "running text and holds no comparisons"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_when_the_recipe_is_loaded(
    tmp_path: Path, stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, stage))


@pytest.mark.parametrize(("loss", "lr"), [("dpo", 5e-7), ("simpo", 5e-7), ("rpo", 5e-7), ("orpo", 5e-6), ("cpo", 5e-6)])
def test_the_default_rate_is_that_of_the_loss(loss: str, lr: float) -> None:
    """Contrasts have DPO's; imitation beside one, with no reference to stay near, has ORPO's; a given rate stays."""
    stage = {"kind": "preference", "data": {"path": "x"}, "loss": loss}
    assert PreferenceStage.model_validate(stage).train.lr == lr
    assert PreferenceStage.model_validate({**stage, "train": {"batch_size": 8}}).train.lr == lr
    assert PreferenceStage.model_validate({**stage, "train": {"lr": 3e-7}}).train.lr == 3e-7
    tasks = {"tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}], "train": {"steps": 1}}
    online = {"kind": "online_preference", "loss": loss, **tasks}
    assert OnlinePreferenceStage.model_validate(online).train.lr == lr


def test_ranked_files_and_losses_of_one_pair_for_each_prompt(tmp_path: Path) -> None:
    rows = tmp_path / "ranked.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "answers": ["x", "y", "z"], "ranks": [1, 2, 3]}) + "\n")
    with pytest.raises(DataError, match=r"ranked.jsonl:1: 3 answers; bco: .* set pairs: best_worst"):
        trained(tmp_path, data={"path": str(rows)}, loss="bco")
    (tmp_path / "again").mkdir()
    assert trained(tmp_path / "again", data={"path": str(rows)}, loss="bco", pairs="best_worst")


def test_a_preset_is_said_in_the_plan_and_changed_on_the_command_line(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, {"loss": "rpo"}), ["stages.p.loss.dpo.beta=0.5"])
    assert str(loaded.origins["stages.p.loss.dpo.beta"]) == "command line"
    assert str(loaded.origins["stages.p.loss.nll.weight"]) == "default"
    terms = loaded.recipe.stages["p"].loss.terms  # type: ignore[union-attr]
    assert {name: term.weight for name, term in terms.items()} == {"dpo": 1.0, "nll": 1.0}
    assert terms["dpo"].beta == 0.5  # type: ignore[attr-defined]


REAL = [
    ("hh_rlhf/dev/harmless-base_test.jsonl.gz", "dpo"),
    ("llamafactory/dev/dpo_en_demo.jsonl.gz", "ipo"),
    ("rasbt/dev/instruction-data-with-preference.jsonl", "orpo"),
    ("llamafactory/dev/kto_en_demo.jsonl.gz", "kto"),
    ("oasst/dev/en_100_tree.jsonl.gz", "dpo"),
    ("pandalm/dev/testset-v1.jsonl.gz", "dpo"),
    ("llmbar/dev/Natural.jsonl", "simpo"),
    ("constitution/dev/438HHHEvaluations.jsonl.gz", "kto"),
    ("xstest/dev/completions_llama2orig.jsonl.gz", "kto"),
]


@pytest.mark.parametrize(("name", "loss"), REAL)
def test_real_rows_train(shared_data: Path, tmp_path: Path, name: str, loss: str) -> None:
    data = {"path": str(shared_data / name), "on_bad_row": "drop", "limit": 12}
    lines = trained(tmp_path, data=data, loss=loss, train={"max_length": 4096})
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    if loss == "dpo":
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
