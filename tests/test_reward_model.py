"""The reward model stage: from rows to a classifier that others load, with what it can and cannot do said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from whet.config import DataConfig
from whet.config.loading import load_recipe
from whet.data.base import Origin, Row, Stepwise
from whet.data.stepwise import to_stepwise
from whet.errors import ConfigError, DataError, UserError
from whet.launch.main import run_recipe
from whet.models.create import byte_tokenizer
from whet.records import Message
from whet.templates.jinja import JinjaTemplate
from whet.tracking.log import read_metrics
from whet.training.answers import read_at, tokenise_answers

MODEL = '{path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32}}'


def run(tmp_path: Path, stage: str, rows: list[dict[str, Any]]) -> Path:
    """The stage's folder after a run on these rows."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"name: rm\nmodel: {MODEL}\nstages:\n  rm:\n    kind: reward_model\n    data: {{path: {tmp_path}/rows.jsonl}}\n"
        f"    {stage}\n"
    )
    run_recipe(load_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path}/run"]), quiet=True)
    return tmp_path / "run" / "stages" / "01-rm"


def test_it_learns_what_is_plain_and_transformers_loads_it(tmp_path: Path) -> None:
    """Politeness wins. The head is read at the stop token, where transformers reads it too."""
    rows = [
        {"prompt": f"Say {i}", "chosen": f"please {i}", "rejected": f"no {i % 7} {'x' * (i % 9)}"} for i in range(200)
    ]
    stage = run(tmp_path, "eval_every: 20\n    train: {lr: 0.01, batch_size: 20, steps: 30}", rows)
    lines = read_metrics(stage)
    assert [line["step"] for line in lines if "eval_accuracy" in line and "eval_loss" in line] == [20, 30]
    assert lines[-1]["eval_accuracy"] == 1.0 and "eval_margin" not in lines[-1]
    found = json.loads((stage / "reward.json").read_text())
    assert found["accuracy"]["mean"] == 1.0 and found["ties"] == 0.0
    assert found["accuracy"]["questions"] == found["count"] > 8
    assert found["baseline"]["mean"] < 0.9
    module, loading = AutoModelForSequenceClassification.from_pretrained(stage / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and module.config.num_labels == 1
    tokenizer, facts = AutoTokenizer.from_pretrained(stage / "model"), module.config.whet_reward
    assert facts["reads"] == "answers" and facts["link"] == "identity" and facts["std"] == 1.0

    def score(answer: str) -> float:
        turns = [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        with torch.no_grad():
            return float(module(**tokenizer(text, return_tensors="pt")).logits) - facts["mean"]

    assert score("please 3") > score("no 3") + 1
    assert abs(score("please 3")) < 1, "preferred answers score 0 on average"
    assert "Accuracy" in (tmp_path / "run" / "report.html").read_text()
    assert "calibration" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("every_token", ["true", "false"])
def test_outcomes(tmp_path: Path, every_token: str) -> None:
    rows = [
        {"prompt": f"Say {i}", "completion": ("yes", "no")[i % 2] + f" {i % 5}", "label": i % 2 == 0} for i in range(80)
    ]
    stage = run(
        tmp_path,
        f"learn: outcomes\n    hold_out: 0.2\n    every_token: {every_token}\n"
        "    train: {lr: 0.02, batch_size: 16, steps: 20}",
        rows,
    )
    found = json.loads((stage / "reward.json").read_text())
    assert found["what"] == "labels" and found["accuracy"]["mean"] == 1.0
    assert found["count"] == found["accuracy"]["questions"], "one judgement for each answer"
    assert json.loads((stage / "model" / "config.json").read_text())["whet_reward"]["link"] == "sigmoid"


def test_steps(tmp_path: Path) -> None:
    """A step with a 9 in it is wrong; what follows a wrong step is not trained on."""
    rows = []
    for i in range(150):
        steps = [f"a{(i * 7 + k * 3) % 10};" for k in range(4)]
        labels = ["9" not in step for step in steps]
        rows.append({"prompt": f"Go {i}", "steps": [*steps[:-1], steps[-1]], "labels": labels})
    stage = run(tmp_path, "learn: steps\n    train: {lr: 0.02, batch_size: 30, steps: 40}", rows)
    found = json.loads((stage / "reward.json").read_text())
    assert found["what"] == "labels" and found["accuracy"]["mean"] > 0.95 > found["baseline"]["mean"]
    assert json.loads((stage / "model" / "config.json").read_text())["whet_reward"]["reads"] == "steps"


# ---------------------------------------------------------------------------------------------- steps, read


def step_row(**values: Any) -> Stepwise:
    return to_stepwise(Row(origin=Origin(source="s.jsonl", line=3), values=values), DataConfig(path="s.jsonl"))


def test_labels_end_with_the_first_wrong_step() -> None:
    steps = ["one\n", "two", "three"]
    assert step_row(prompt="p", steps=steps, labels=[True, False, True]).labels == (1.0, 0.0)
    assert step_row(prompt="p", steps=steps, labels=[0.5, 0.25, 1]).labels == (0.5, 0.25, 1.0)
    assert step_row(prompt="p", completions=steps, labels=[1, 1, 0]).labels == (1.0, 1.0, 0.0)
    assert step_row(prompt="p", steps=steps, label=1).labels == (1.0, 0.0)
    assert step_row(prompt="p", steps=steps, label=-1).labels == (1.0, 1.0, 1.0)
    assert step_row(prompt="p", steps=steps, label=-1).steps == ("one\n", "two\n", "three")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": ["a"], "labels": [1]}, "s.jsonl:3: prompt: no such column"),
        ({"prompt": "p", "labels": [1]}, "completions: not a list of steps"),
        ({"prompt": "p", "steps": ["a", " "], "labels": [1, 1]}, r"steps\[1\]: empty text"),
        ({"prompt": "p", "steps": ["a"], "labels": [1, 1]}, "labels: not one label for each step"),
        ({"prompt": "p", "steps": ["a"], "labels": ["1"]}, r"labels\[0\]: not a label; it is text"),
        ({"prompt": "p", "steps": ["a"], "labels": [float("nan")]}, r"labels\[0\]: not a label"),
        ({"prompt": "p", "steps": ["a"], "labels": [-1]}, r"labels\[0\]: not a label"),
        ({"prompt": "p", "steps": ["a"], "label": 1}, "label: not the index of a step"),
        ({"prompt": "p", "steps": ["a"], "label": True}, "label: not the index of a step"),
    ],
)
def test_a_bad_row_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        step_row(**values)


def test_a_step_is_read_where_it_is_complete_and_the_last_at_the_stop_token() -> None:
    template = JinjaTemplate(byte_tokenizer())
    prompt = (Message(role="user", content="go"),)
    answer = "eins\nzwei \u00fc\ndrei"
    row = read_at((*prompt, Message(role="assistant", content=answer)), (5, 12, 16), template, max_length=100)
    assert tuple(row.tokens[: row.shared].tolist()) == template.prompt(prompt)
    ends = [place for place, trained in enumerate(row.trained) if trained]
    shown = [template.decode(row.tokens[row.shared : end + 1]) for end in ends]
    assert shown == ["eins\n", "eins\nzwei \u00fc\n", f"{answer}<|im_end|>"]
    assert len(row.tokens) == ends[-1] + 1


def test_what_cannot_be_read_is_dropped_and_counted() -> None:
    def example(*steps: str, prompt: str = "go") -> Stepwise:
        return Stepwise(
            origin=Origin(source="s.jsonl", line=1),
            prompt=(Message(role="user", content=prompt),),
            steps=steps,
            labels=(1.0,) * len(steps),
        )

    template, good = JinjaTemplate(byte_tokenizer()), example("a\n", "b")
    bad = [example("a\n" * 50), example("a\n", "", "b")]
    rows, dropped = tokenise_answers([good, *bad], template, max_length=40, on_bad_row="drop")
    assert len(rows) == 1 and dropped.total == 2
    with pytest.raises(DataError, match="two steps end in the same token"):
        tokenise_answers(bad[1:], template, max_length=40, on_bad_row="error")


# ------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("learn: steps\n    centring: 0.1", "ranking, centring and normalise are for comparisons"),
        ("every_token: true", "every_token is for outcomes"),
        ("ranking: plackett_luce\n    centring: 0.1", "centring is a term of pairs"),
        ("learn: pairs", "must be 'comparisons', 'ratings', 'outcomes' or 'steps'"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, stage, [])


@pytest.mark.parametrize("shade", [{"margin": 1.0}, {"confidence": 0.9}])
def test_a_ranking_as_one_choice_has_no_place_for_margins_and_doubts(tmp_path: Path, shade: dict[str, float]) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b", **shade}]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: has a margin or a confidence.*ranking: pairs"):
        run(tmp_path, "ranking: plackett_luce\n    hold_out: 0", rows)


def test_rows_without_an_answer_to_compare_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: rejected"):
        run(tmp_path, "eval_every: 5", [{"prompt": "p", "chosen": "a"}])


# ----------------------------------------------------------------------------------------------- real rows


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("hh_rlhf/dev/harmless-base_test.jsonl.gz", "ranking: plackett_luce"),
        ("oasst/dev/en_100_tree.jsonl.gz", "ranking: pairs"),
        ("pandalm/dev/testset-v1.jsonl.gz", "ranking: pairs"),
        ("xstest/dev/completions_llama2orig.jsonl.gz", "learn: outcomes"),
        ("processbench/dev/gsm8k.jsonl.gz", "learn: steps"),
        ("prmbench/dev/prmbench_all.jsonl.gz", "learn: steps"),
        ("bigbench_mistake/dev/word_sorting.jsonl.gz", "learn: steps"),
    ],
)
def test_real_rows(tmp_path: Path, shared_data: Path, file: str, stage: str) -> None:
    """No crash, nothing silent: what is left out is counted, and what is held out is judged with an interval."""
    data = f"{{path: {shared_data / file}, limit: 60, on_bad_row: drop}}"
    train = "{steps: 3, batch_size: 8, max_length: 2000, lr: 0.001}"
    (tmp_path / "recipe.yaml").write_text(
        f"name: real\nmodel: {MODEL}\nstages:\n"
        f"  rm: {{kind: reward_model, {stage}, data: {data}, hold_out: 0.3, train: {train}}}\n"
    )
    run_recipe(load_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path}/run"]), quiet=True)
    found = json.loads((tmp_path / "run" / "stages" / "01-rm" / "reward.json").read_text())
    assert found["count"] > 10 and found["accuracy"]["low"] < found["accuracy"]["mean"] < found["accuracy"]["high"]
