"""The distill stage and `credit: teacher`: what runs, what is read once, what resumes, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from whet.config import ModelConfig, PolicyConfig
from whet.config.loading import load_recipe
from whet.errors import ConfigError, ModelError
from whet.files import unseal
from whet.launch.check import check_recipe
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld
from whet.models.load import load_model
from whet.tracking.log import read_metrics

RECIPE = """\
name: small
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
sampling: {max_tokens: 8}
stages:
  teacher: {kind: sft, data: {generate: arithmetic, count: 16}, train: {steps: 2, batch_size: 8, lr: 0.02}}
  distill:
    kind: distill
    model: {path: "whet:tiny", create: {hidden_size: 24, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
    teacher: "@teacher"
    data: {generate: arithmetic, count: 16}
    eval_data: {generate: arithmetic, count: 8, split: test}
    tasks: {generate: arithmetic}
    divergence: jsd
    top_k: 8
    prompts_per_step: 4
    rollouts_per_prompt: 2
    train: {steps: 6, batch_size: 8, lr: 0.02}
"""


def load(folder: Path, *words: str) -> Any:
    (folder / "recipe.yaml").write_text(RECIPE)
    return load_recipe(folder / "recipe.yaml", [f"out={folder / 'run'}", *words])


def lines(folder: Path) -> list[dict[str, float | None]]:
    """What was measured, without what depends on the clock."""
    found = read_metrics(folder / "run" / "stages" / "02-distill")
    return [{k: v for k, v in line.items() if not k.startswith(("time", "tokens_per"))} for line in found]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both kinds of steps."""
    folder = tmp_path_factory.mktemp("done")
    run_recipe(load(folder), quiet=True)
    return folder


def test_given_rows_and_own_answers_take_turns(done: Path) -> None:
    found = lines(done)
    own = ["completions/mean_length" in line for line in found]
    assert set(own) == {True, False}
    assert all(0 < (line["loss"] or 0) < 1 for line in found)
    assert "rewards/repetition" in found[own.index(True)]
    assert (found[-1]["eval_loss"] or 1) < (found[0]["loss"] or 0)
    unseal(done / "run" / "stages" / "02-distill")


def test_a_stopped_run_goes_on_as_if_it_never_had_and_reads_no_row_twice(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet.algorithms import distill

    asked: list[int] = []
    chosen = distill.OwnAnswers.chosen

    def stop(self: Any, step: int) -> bool:
        if step == 4 and not asked:
            asked.append(step)
            raise KeyboardInterrupt
        return chosen(self, step)

    monkeypatch.setattr(distill.OwnAnswers, "chosen", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load(tmp_path, "save.every=1"), quiet=True)
    monkeypatch.setattr(LocalWorld, "teacher", None)  # what it said is on disk
    run_recipe(load(tmp_path, "save.every=1"), quiet=True)
    assert lines(tmp_path) == lines(done)


def test_a_student_is_looked_at_on_the_way_and_the_best_one_kept(tmp_path: Path) -> None:
    tasks = "{tasks: {generate: arithmetic, count: 2, split: test}, rewards: [{kind: verifier}]}"
    words = [f"stages.distill.evaluation={tasks}", "stages.distill.eval_every=3", "stages.distill.train.steps=4"]
    run_recipe(load(tmp_path, *words, "stages.distill.best={metric: eval_loss}"), quiet=True)
    looked = [line["step"] for line in lines(tmp_path) if "eval_solved" in line and "eval_loss" in line]
    assert looked == [0, 3, 4]
    assert (tmp_path / "run" / "stages" / "02-distill" / "best" / "model.safetensors").is_file()


def test_a_teacher_with_other_tokens_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    other = tmp_path / "other"
    load_model(ModelConfig(path="whet:tiny")).export(other)
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(other)
    for run in (check_recipe, run_recipe):
        with pytest.raises(ModelError, match=r"other: its tokenizer is not that of whet:tiny .* can still write rows"):
            run(load(tmp_path, f"stages.distill.teacher={other}"))
    assert not (tmp_path / "run" / "stages" / "01-teacher" / "manifest.json").exists()


def test_a_padded_head_of_a_teacher_is_cut_and_a_short_one_is_refused(tmp_path: Path) -> None:
    plain = ModelConfig(path="whet:tiny")
    model = load_model(plain)
    model.module.resize_token_embeddings(model.vocabulary + 6)
    model.export(tmp_path / "padded")
    padded = ModelConfig(path=str(tmp_path / "padded"))
    assert LocalWorld().teacher(padded, plain).model.vocabulary == load_model(plain).vocabulary
    with pytest.raises(ModelError, match=r"its head has 266 rows and that of .*padded 272"):
        LocalWorld().teacher(plain, padded)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("stages.distill.data=null", "on_policy mixes given rows"),
        ("stages.distill.divergence=reverse_kl", "beta has no effect"),
        ("stages.distill.train.steps=null", "train.steps must be given"),
        ("stages.distill.teacher=@nobody", "no earlier stage"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(word: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(tmp_path, "stages.distill.on_policy=0.3", "stages.distill.beta=0.3", word)


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ({"credit": "teacher"}, "go together"),
        ({"teacher": "a/b"}, "go together"),
        ({"credit": "teacher", "teacher": "a/b"}, "use baseline: none"),
    ],
)
def test_a_teacher_as_credit_needs_its_axes(axes: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PolicyConfig.model_validate(axes)
    whole = PolicyConfig.model_validate({"credit": "teacher", "teacher": "a/b", "baseline": "none", "scale": "none"})
    assert whole.teacher == whole.teacher.model_validate("a/b")  # type: ignore[union-attr]


def test_what_the_teacher_said_is_kept_beside_the_rows(done: Path) -> None:
    kept = done / "run" / "stages" / "02-distill" / "teacher"
    assert sorted(path.name for path in kept.iterdir()) == ["eval", "train"]
    assert shutil.disk_usage(kept).total and (kept / "train" / "00000.safetensors").stat().st_size > 16 * 8 * 8
