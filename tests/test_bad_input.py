"""Whatever is wrong outside whet is one line that names place and remedy, and the exit code of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whet.cli.app import main
from whet.config import CreateConfig
from whet.models.create import byte_tokenizer, create_model
from whet.tracking.log import read_metrics, read_rollouts

SHAPE = CreateConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16, max_length=64)
MODEL = f'{{path: "whet:tiny", create: {SHAPE.model_dump_json()}}}'
SFT = f"""
name: sft
model: {MODEL}
stages:
  sft: {{kind: sft, data: {{path: good.jsonl}}, train: {{steps: 2, batch_size: 2}}}}
"""
RL = f"""
name: rl
model: {MODEL}
stages:
  rl:
    kind: rl
    tasks: {{path: tasks.jsonl}}
    rewards: [{{kind: function, path: "reward.py:reward", deadline_s: 20}}]
    prompts_per_step: 2
    rollouts_per_prompt: 2
    sampling: {{max_tokens: 6}}
    train: {{steps: 5, lr: 0.001}}
"""
EVAL = f"""
name: eval
model: {MODEL}
stages:
  eval:
    kind: eval
    models: {{a: "@model", b: "@model"}}
    tasks: {{path: tasks.jsonl}}
    rewards: [{{kind: exact}}]
    samples: 1
    sampling: {{max_tokens: 6}}
"""
ROWS = f"""
name: rows
model: {MODEL}
stages:
  compare: {{kind: compare, tasks: {{path: tasks.jsonl}}, judge: {{model: {{script: "judge.py:wins"}}}}}}
  revise: {{kind: revise, tasks: {{path: tasks.jsonl}}, principles: [Be kind.], writer: {{script: "judge.py:wins"}}}}
  ask: {{kind: questions, data: {{path: "@compare"}}, form: pairs, teacher: {{script: "judge.py:wins"}}}}
"""
SCORED = f"""
name: scored
model: {MODEL}
stages:
  rm: {{kind: reward_model, data: {{path: pairs.jsonl}}}}
  prm: {{kind: reward_model, data: {{path: steps.jsonl}}, learn: steps}}
  rl: {{kind: rl, tasks: {{path: tasks.jsonl}}, rewards: [{{kind: model, path: "@rm"}}], train: {{steps: 1}}}}
"""
DATA = "stages.sft.data.path="
REWARDS = "stages.eval.rewards="

FILES: dict[str, str | bytes] = {
    "sft.yaml": SFT,
    "rl.yaml": RL,
    "eval.yaml": EVAL,
    "rows.yaml": ROWS,
    "scored.yaml": SCORED,
    "twice.yaml": SFT + "name: again\n",
    "good.jsonl": '{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+2", "completion": "3"}\n',
    "tasks.jsonl": "".join(json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(6)),
    "cut.jsonl": '{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+2", "comp',
    "broken.jsonl": '{"prompt": "1+1", "completion": "2"}\n{"prompt": 1+2}\n{"prompt": "1", "completion": "2"}\n',
    "binary.jsonl": b'{"prompt": "\xff\xfe", "completion": "2"}\n',
    "columns.jsonl": '{"question": "1+1", "completion": "2"}\n',
    "empty.jsonl": '{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+1", "completion": " "}\n',
    "nothing.jsonl": "",
    "long.jsonl": json.dumps({"prompt": "a" * 70, "completion": "b"}) + "\n",
    "forged.jsonl": json.dumps({"prompt": "<|im_end|>", "completion": "b"}) + "\n",
    "null.jsonl": '{"prompt": "1+1", "answer": null}\n',
    "broken.jinja": "{% for m in messages %}",
    "judge.py": "def wins(messages):\n    return 'A'\n",
    "reward.py": "def reward(completions, **_):\n    return [float(i % 2) for i in range(len(completions))]\n",
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def whet(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: its exit code, standard output and standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run


CASES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown key": (("sft", "stages.sft.train.lrr=1"), 2, "stages.sft.train.lrr: unknown key; did you mean 'lr'?"),
    "wrong type": (("sft", "stages.sft.train.lr=fast"), 2, "stages.sft.train.lr: must be a number, got 'fast'"),
    "key given twice": (("twice",), 2, "twice.yaml:6: name: given twice, first in line 2"),
    "no recipe": (("stf",), 2, "stf.yaml: no such recipe; did you mean 'sft.yaml'?"),
    "no data file": (("sft", DATA + "god.jsonl"), 3, "god.jsonl: no such file or folder; did you mean 'good.jsonl'?"),
    "a broken line": (("sft", DATA + "broken.jsonl"), 3, "broken.jsonl:2: not valid JSON"),
    "a line cut short": (("sft", DATA + "cut.jsonl"), 3, "cut.jsonl:2: the last line is cut short"),
    "not text": (("sft", DATA + "binary.jsonl"), 3, "binary.jsonl:1: not UTF-8"),
    "a wrong column": (("sft", DATA + "columns.jsonl"), 3, "columns.jsonl:1: columns of no known format"),
    "an empty message": (("sft", DATA + "empty.jsonl"), 3, "empty.jsonl:2: completion: empty text"),
    "an empty file": (("sft", DATA + "nothing.jsonl"), 3, "nothing.jsonl: it has no rows"),
    "a row too long": (("sft", DATA + "long.jsonl"), 3, "long.jsonl:1: messages: longer than the model attends to, 64"),
    "a row above max_length": (
        ("sft", DATA + "long.jsonl", "train.max_length=9"), 3, "long.jsonl:1: messages: longer than max_length 9; it"
    ),
    "a forged turn": (("sft", DATA + "forged.jsonl"), 3, "forged.jsonl:1: messages[0]: the text contains the special"),
    "nothing left": (("sft", DATA + "long.jsonl", "stages.sft.data.on_bad_row=drop"), 3, "nothing to train on; 1 row"),
    "a task too long": (("rl", "stages.rl.tasks.path=long.jsonl"), 3, "long.jsonl:1: the prompt has no room"),
    "no data on the hub": (("sft", DATA + "nobody/none"), 3, "the hub data set nobody/none/train could not be loaded"),
    "no gold answer": (
        ("eval", REWARDS + "[{kind: exact, gold: gold}]"), 3,
        "tasks.jsonl:1: reward 'exact' needs the column 'gold'; the row's columns: answer",
    ),
    "no model directory": (("sft", "model=./none"), 4, "./none: no such directory, and not a hub id"),
    "no model on the hub": (("sft", "model=nobody/none"), 4, "nobody/none: no model configuration could be read"),
    "no built-in model": (("sft", "model=whet:big"), 4, "no built-in model 'whet:big'; there are whet:tiny"),
    "no template file": (("sft", "model.chat_template=none.jinja"), 4, "model.chat_template: no file none.jinja"),
    "a broken template": (("sft", "model.chat_template=broken.jinja"), 4, "Unexpected end of template"),
    "no such adapter": (("sft", "stages.sft.train.lora={targets: [none]}"), 4, "Target modules {'none'} not found"),
    "no reward file": (("rl", "stages.rl.rewards.0.path=rewrad.py:f"), 7, "does not exist; did you mean reward.py?"),
    "no reward function": (("rl", "stages.rl.rewards.0.path=reward.py:f"), 7, "reward.py has no function 'f'"),
    "a null answer": (("eval", "stages.eval.tasks.path=null.jsonl"), 3, "needs the column 'answer'; it is null"),
    "steps by a model of answers": (
        ("scored", "stages.rl.rewards.0.kind=process_model"), 2, "@rm learns comparisons; use kind: model for it",
    ),
    "an answer by a model of steps": (
        ("scored", "stages.rl.rewards.0.path=@prm"), 2, "@prm learns steps; use kind: process_model for it",
    ),
    "steps cut elsewhere than they were labelled": (
        (str(Path(__file__).parents[1] / "recipes" / "process"), "stages.rl.rewards.0.separator=+"), 2,
        """rewards: @prm learns steps that end with ';'; give separator: ';'""",
    ),
    "no verifier": (("eval", REWARDS + "[{kind: verifier}]"), 3, "are of no known data set; name the reward"),
    "nothing judges": (("eval", REWARDS + "[{kind: format}]"), 7, "none of the rewards says what is right"),
    "a path as label": (("eval", "stages.eval.models={../x: '@model'}"), 2, "the label '../x' names files"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_its_exit_code(whet: Callable[..., tuple[int, str, str]], case: str) -> None:
    (name, *words), code, text = CASES[case]
    got, output, errors = whet("run", f"{name}.yaml", *words, "--json")
    assert got == code
    (line,) = errors.splitlines()
    assert line.startswith("whet: ") and text in line
    last = json.loads(output.splitlines()[-1])
    assert (last["ok"], last["exit_code"]) == (False, code) and text in last["error"]


@pytest.mark.parametrize("case", [case for case, (_, code, _) in CASES.items() if code == 3 or "template" in case])
def test_check_finds_it_before_the_run_does(whet: Callable[..., tuple[int, str, str]], case: str) -> None:
    (name, *words), code, text = CASES[case]
    got, _, errors = whet("check", f"{name}.yaml", *words)
    assert got == code and text in errors
    assert not Path("runs").exists()


SCRIPTS = {
    "no judge": ("stages.compare.judge.model.script=judge.py:winz", 7, "no function 'winz'; did you mean 'wins'?"),
    "no writer": ("stages.revise.writer.script=jugde.py:wins", 7, "jugde.py does not exist; did you mean judge.py?"),
    "no teacher": ("stages.ask.teacher.script=judge:winz", 7, "script: ModuleNotFoundError: No module named 'judge'"),
    "no host": ("stages.compare.judge.model={base_url: host, model: m}", 2, "base_url is 'host'; write it in full"),
    "no key": (
        "stages.revise.writer={base_url: 'http://127.0.0.1:9', model: m, api_key_env: NO_KEY}", 2,
        "the environment variable NO_KEY is not set",
    ),
    "no principles": ("stages.compare.judge.principles=none.txt", 2, "principles: none.txt: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCRIPTS)
def test_whoever_is_to_be_asked_is_looked_for_by_check(whet: Callable[..., tuple[int, str, str]], case: str) -> None:
    """A stage that asks comes after others that train for hours: too late for a typo."""
    override, code, text = SCRIPTS[case]
    got, _, errors = whet("check", "rows.yaml", override)
    (line,) = errors.splitlines()
    assert got == code and line.startswith("whet: ") and text in line


MISSING = {
    "tokenizer.json": "has no tokenizer",
    "chat_template.jinja": "has no chat template (a base model?); give model.chat_template a Jinja file",
    "config.json": "a directory without config.json is not a Hugging Face model",
    "model.safetensors": "the model could not be loaded",
}


@pytest.mark.parametrize("file", MISSING)
def test_a_model_directory_that_lacks_a_file(whet: Callable[..., tuple[int, str, str]], file: str) -> None:
    tokenizer = byte_tokenizer()
    create_model(SHAPE, tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("model", file).unlink()
    if file == "tokenizer.json":
        Path("model", "tokenizer_config.json").unlink()
    code, _, errors = whet("run", "sft.yaml", "model.path=./model")
    assert code == 4
    assert errors.splitlines()[-1].startswith("whet: ./model") and MISSING[file] in errors


# ------------------------------------------------------------------------------------- reward functions


def reward(body: str) -> None:
    code = f"import os, sys, time\ndef reward(completions, trainer_state, **_):\n    {body}\n"
    code += "    return [float(i % 2) for i in range(len(completions))]\n"
    Path("reward.py").write_text(code)


FAILURES = {
    "raises": ("raise KeyError('gone')", "grader_error", "KeyError: 'gone' (reward.py:3)"),
    "hangs": ("time.sleep(60)", "grader_timeout", "did not answer within 0.5 s and was killed"),
    "NaN": ("return [float('nan')] * len(completions)", "grader_error", "returned nan"),
    "too few": ("return [1.0]", "grader_error", "returned 1 values for 4 completions"),
    "text": ("return 'good'", "grader_error", "returned a str, not a list with one number for each completion"),
    "nothing applies": ("return [None] * len(completions)", "grader_error", "no reward applies"),
    "exits": ("sys.exit(3)", "grader_error", "SystemExit: 3 (reward.py:3)"),
    "dies": ("os._exit(3)", "grader_error", "the worker exited with code 3"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_step_goes_on_without_what_could_not_be_scored(
    whet: Callable[..., tuple[int, str, str]], failure: str
) -> None:
    """It fails in steps 1 and 2 (counted from 0) of 5, for all answers of the step."""
    body, outcome, note = FAILURES[failure]
    reward(f"if trainer_state.global_step in (1, 2): {body}".replace("    time", "time"))
    code, _, errors = whet("run", "rl.yaml", "stages.rl.rewards.0.deadline_s=0.5" if failure == "hangs" else "seed=0")
    assert (code, "Traceback" in errors, "nan" in errors.replace("returned nan", "")) == (0, False, False)
    assert errors.count(f"4 of 4 answers were not scored: 4 {outcome} (") == 2
    stage = Path("runs", "rl", "stages", "01-rl")
    lines = read_metrics(stage)
    assert [line["unscored"] for line in lines] == [0, 4, 4, 0, 0]
    assert [line["optimizer_steps"] for line in lines] == [1, 0, 0, 1, 1]
    assert all(line[f"outcomes/{outcome}"] == 4 and line["reward"] is None for line in lines[1:3])
    for rollout in read_rollouts(stage, 2):
        assert (rollout.outcome, rollout.reward) == (outcome, None) and note in rollout.note


@pytest.mark.parametrize("failure", ["raises", "too few", "dies"])
def test_a_reward_that_always_fails_stops_the_run_with_its_reason(
    whet: Callable[..., tuple[int, str, str]], failure: str
) -> None:
    body, outcome, note = FAILURES[failure]
    reward(body)
    code, _, errors = whet("run", "rl.yaml", "--quiet")
    assert code == 7
    assert f"no answer of the last 3 steps could be scored; the last one: {outcome}: reward: " in errors
    assert note in errors
    assert Path("runs", "rl", "report.html").exists()
    reward("pass")
    assert whet("run", "rl.yaml")[0] == 0
    assert [line["step"] for line in read_metrics(Path("runs", "rl", "stages", "01-rl"))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("steps", "said"), [(1, "the last step"), (2, "the last 2 steps")])
def test_a_short_stage_in_which_nothing_was_scored_is_not_done(
    whet: Callable[..., tuple[int, str, str]], steps: int, said: str
) -> None:
    reward("raise KeyError('gone')")
    code, _, errors = whet("run", "rl.yaml", f"stages.rl.train.steps={steps}", "--quiet")
    assert code == 7 and f"whet: no answer of {said} could be scored; the last one: grader_error: reward: " in errors
    assert not Path("runs", "rl", "stages", "01-rl", "manifest.json").exists()


def test_one_bad_value_is_one_answer_scored_lowest(whet: Callable[..., tuple[int, str, str]]) -> None:
    """NaN beside good values of the same task is the answer's doing; None means that the reward does not apply."""
    reward("return [float('nan'), 1.0, 0.5, None][: len(completions)]")
    assert whet("run", "rl.yaml")[0] == 0
    lines = read_metrics(Path("runs", "rl", "stages", "01-rl"))
    assert [(line["unscored"], line["reward"], line["outcomes/grader_gave_up"]) for line in lines] == [(1, 0.5, 1)] * 5


def test_what_a_reward_prints_goes_nowhere(whet: Callable[..., tuple[int, str, str]]) -> None:
    reward("sys.stdout.write('x' * 10_000_000), sys.stderr.write('y' * 10_000_000), os.write(1, b'z' * 1000)")
    code, output, errors = whet("run", "rl.yaml", "--json")
    assert (code, errors) == (0, "")
    assert output.count("\n") == 1 and json.loads(output)["ok"]


@pytest.mark.parametrize(
    ("word", "code", "text"),
    [
        ("tasks.path=task.jsonl", 3, "task.jsonl: no such file or folder; did you mean 'tasks.jsonl'?"),
        ("tasks.path=null.jsonl", 3, "needs the column 'answer'; it is null"),
        ("rewards=[{kind: function, path: 'rewrad.py:f'}]", 7, "does not exist; did you mean reward.py?"),
        ("rewards=[{kind: judge, model: {script: 'juge.py:wins'}}]", 7, "did you mean judge.py?"),
    ],
)
def test_what_a_later_stage_lacks_is_said_before_the_first_one_trains(
    whet: Callable[..., tuple[int, str, str]], word: str, code: int, text: str
) -> None:
    Path("both.yaml").write_text(SFT + EVAL[EVAL.index("  eval:") :])
    got, _, errors = whet("run", "both.yaml", "out=both", f"stages.eval.{word}")
    assert (got, text in errors, Path("both", "recipe.json").exists()) == (code, True, False), errors


def test_a_folder_that_was_refused_beforehand_takes_the_recipe_once_it_is_mended(
    whet: Callable[..., tuple[int, str, str]],
) -> None:
    Path("both.yaml").write_text(SFT + EVAL[EVAL.index("  eval:") :])
    assert whet("run", "both.yaml", "-q", "stages.eval.tasks.path=task.jsonl")[0] == 3
    assert whet("run", "both.yaml", "-q")[0] == 0


def test_a_finished_stage_is_not_looked_at_again(whet: Callable[..., tuple[int, str, str]]) -> None:
    Path("both.yaml").write_text(SFT + EVAL[EVAL.index("  eval:") :])
    assert whet("run", "both.yaml", "-q")[0] == 0
    for name in ("good.jsonl", "tasks.jsonl"):
        Path(name).unlink()
    assert whet("run", "both.yaml", "-q")[0] == 0


def test_what_a_killed_stage_left_half_made_is_no_mistake(whet: Callable[..., tuple[int, str, str]]) -> None:
    Path("both.yaml").write_text(SFT + EVAL[EVAL.index("  eval:") :].replace("@model", "@sft"))
    model = Path("runs", "sft", "stages", "01-sft", "model")
    model.mkdir(parents=True)
    (model / "config.json").write_text("{")
    assert whet("run", "both.yaml", "-q")[0] == 0


def test_an_evaluation_that_cannot_be_graded_says_why(whet: Callable[..., tuple[int, str, str]]) -> None:
    reward("raise KeyError('gone')")
    rewards = REWARDS + "[{kind: function, path: 'reward.py:reward', verifies: true}]"
    code, _, errors = whet("run", "eval.yaml", rewards, "-q")
    assert code == 7
    assert errors == (
        "whet: eval: no answer of a could be graded; "
        "the last one: grader_error: reward: KeyError: 'gone' (reward.py:3)\n"
    )
    reward("pass")
    assert whet("run", "eval.yaml", rewards)[0] == 0


# --------------------------------------------------------------------------------------------- commands


def last_json(output: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(output.splitlines()[-1])
    return value


def test_with_json_every_command_ends_with_its_result(whet: Callable[..., tuple[int, str, str]]) -> None:
    code, output, errors = whet("run", "eval.yaml", "--json")
    assert (code, errors, last_json(output)["evaluations"]["eval"]["k"]) == (0, "", 1)
    code, output, errors = whet("eval", "eval.yaml", "-m", "x=whet:demo", "-m", "y=whet:demo", "--json")
    rows = last_json(output)["evaluation"]["rows"]
    assert (code, errors, [row["label"] for row in rows]) == (0, "", ["x", "y"])
    assert rows[0]["gain"] is None and rows[1]["gain"] == 0
    code, output, errors = whet("check", "sft.yaml", "--json")
    assert (code, errors, last_json(output)["stages"][0]["stage"]) == (0, "", "sft")
    code, output, errors = whet("chat", "whet:demo", "-p", "2+2", "--json")
    assert (code, errors, len(last_json(output)["answers"])) == (0, "", 1)


def test_an_evaluation_names_the_model_whose_progress_it_shows(whet: Callable[..., tuple[int, str, str]]) -> None:
    _, _, errors = whet("run", "eval.yaml")
    assert [line.split("  ")[:2] for line in errors.splitlines() if "  1/1" in line] == [
        ["eval a", "1/1"],
        ["eval b", "1/1"],
    ]


def test_what_chat_and_eval_cannot_find(whet: Callable[..., tuple[int, str, str]]) -> None:
    assert whet("run", "rl.yaml", "stages.rl.rewards=[{kind: exact}]", "stages.rl.tasks.path=none.jsonl")[0] == 3
    for words, code, text in (
        (("chat", "none"), 4, "none: no such directory"),
        (("chat", "runs/rl"), 6, "runs/rl: none of its stages (rl) made a model yet; run it to the end"),
        (("chat", "runs/rl@rl"), 6, "runs/rl: its stage rl has made no model yet; run it to the end"),
        (("chat", "whet:demo", "-p", "<|im_end|>"), 3, "contains the special token '<|im_end|>'"),
        (("chat", "whet:demo", "-p", "1" * 5000), 3, "the model attends to"),
        (("eval", "none.jsonl", "-m", "x=whet:demo"), 3, "none.jsonl: no such file or folder"),
        (("eval", "sft.yaml"), 2, "sft: the recipe has no stage of kind eval"),
        (("eval", "eval.yaml", "-m", "x"), 2, "--model x: write LABEL=PATH"),
        (("eval", "eval.yaml", "-m", "x=a", "-m", "x=b"), 2, "the label is taken by a"),
        (("eval", "eval.yaml", "-m", "x=none"), 4, "none: no such directory"),
    ):
        got, _, errors = whet(*words)
        assert (got, len(errors.splitlines())) == (code, 1) and text in errors


def test_an_answer_of_chat_stays_within_what_the_model_attends_to(whet: Callable[..., tuple[int, str, str]]) -> None:
    assert whet("run", "sft.yaml")[0] == 0
    code, output, _ = whet("chat", "runs/sft", "-p", "12+34", "--max-tokens", "1000", "--json")
    assert code == 0 and 0 < len(last_json(output)["answers"][0]) <= 64
