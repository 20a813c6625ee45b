"""From Python and between runs: one path for scripts and commands, RUN@stage as a model, held-out numbers compared."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import whet
from whet.cli.app import main
from whet.config import ModelConfig, SamplingConfig
from whet.config.loading import load_recipe
from whet.envs.base import Observed, Opening
from whet.errors import ConfigError, DataError, ModelError, RunError
from whet.evals.run import loss_table
from whet.launch.compare import compare_runs
from whet.launch.evaluate import evaluate, load_rows
from whet.launch.talk import open_conversation
from whet.models.tokenizer import require_same_template
from whet.records import Message
from whet.tracking.console import Console

TINY = {
    "path": "whet:tiny",
    "create": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16},
}
ROWS = [{"prompt": f"{a}+1", "completion": str(a + 1)} for a in range(8)]
TASKS = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]
SFT = {"data": ROWS, "train": {"steps": 2, "batch_size": 4, "lr": 0.01}}
GRPO: dict[str, Any] = {
    "tasks": TASKS,
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
    "sampling": {"max_tokens": 4},
    "train": {"steps": 1},
}


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(said)) for said in completions]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sft(out: str = "runs/sft", **changes: Any) -> Any:
    return whet.train("sft", TINY, out=out, quiet=True, **{**SFT, **changes})


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def cli(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


# ------------------------------------------------------------------------------------------ run and train


def test_importing_whet_imports_nothing_heavy() -> None:
    code = "import sys, whet; dir(whet); assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(whet.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        whet.tran  # noqa: B018


def test_python_and_the_command_line_take_one_path() -> None:
    """The same weights and rows from `whet.train`, `whet.run` of a file, and one of a mapping."""
    run = sft()
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (rows,) = Path("runs/sft/given").iterdir()
    assert rows.read_text() == Path("rows.jsonl").read_text()
    Path("r.yaml").write_text(
        f"name: r\nmodel: {json.dumps(TINY)}\nstages:\n"
        "  sft: {kind: sft, data: rows.jsonl, train: {batch_size: 4}}\n"
    )
    other = whet.run("r.yaml", "train.steps=2", "stages.sft.train.lr=0.01", quiet=True)
    stages = {"sft": {"kind": "sft", **SFT}}
    third = whet.run({"name": "m", "model": TINY, "stages": stages}, "out=runs/third", quiet=True)
    for name, value in weights(run.model()).items():
        assert np.array_equal(value, weights(other.model())[name])
        assert np.array_equal(value, weights(third.model("sft"))[name])
    assert str(third.folder) == "runs/third"
    renamed = [{"path": row["prompt"], "gold": row["completion"]} for row in ROWS]
    mapped = sft("runs/mapped", data=[{"path": renamed, "columns": {"prompt": "path", "completion": "gold"}}])
    for name, value in weights(run.model()).items():
        assert np.array_equal(value, weights(mapped.model())[name])


def test_the_same_call_finds_it_done_and_another_is_refused_by_name() -> None:
    before = sft().metrics()
    assert sft().metrics().equals(before)
    with pytest.raises(RunError, match=r"sft: data \(.*8 rows then, 7 now"):
        sft(data=ROWS[:7])
    with pytest.raises(RunError, match=r"train\.lr"):
        sft(train={**SFT["train"], "lr": 0.02})  # type: ignore[dict-item]


def test_keys_of_the_run_are_taken_beside_those_of_its_stage() -> None:
    run = sft("runs/kept", name="mine", save={"every": 1}, trackers=[])
    assert (run.recipe["name"], run.recipe["save"]["every"]) == ("mine", 1)


def test_a_function_trains_inside_a_running_loop_and_is_known_by_its_source() -> None:
    start = str(sft().folder)

    async def notebook() -> Any:
        return whet.train("grpo", start, rewards=length, out="runs/rl", quiet=True, **GRPO)

    run = asyncio.run(notebook())
    rollouts = run.rollouts()
    assert rollouts.reward.tolist() == [float(len(said)) for said in rollouts.completion.str.split("<|im_end|>").str[0]]
    assert rollouts.parts[0] == {"length": rollouts.reward[0]}
    assert run.recipe["stages"]["grpo"]["rewards"][0]["path"].startswith("length (from Python, source ")

    def length_of(completions: list[str], **columns: Any) -> list[float]:
        return [1.0 for _ in completions]

    length_of.__name__ = "length"
    with pytest.raises(RunError, match=r"rewards\.0\.path \(was length \(from Python, source "):
        whet.train("grpo", start, rewards=[length_of], out="runs/rl", quiet=True, **GRPO)


def test_it_runs_in_a_thread_that_is_not_the_main_one() -> None:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(sft()))
    thread.start()
    thread.join()
    assert made[0].stages == {"sft": "done"}


class Echo:
    """Says what the answer was, up to `turns` answers."""

    def __init__(self, task: Any, turns: int = 2) -> None:
        self.task, self.left = task, turns

    async def start(self, *, seed: int) -> Opening:
        return Opening(messages=self.task.messages)

    async def step(self, message: Message) -> Observed:
        self.left -= 1
        said = Message(role="user", content=f"You said {len(message.content)}.")
        return Observed(messages=(said,), over=self.left == 0)

    async def close(self) -> dict[str, float]:
        return {}


def turns(completions: list[Any], **columns: Any) -> list[float]:
    return [float(sum(message["role"] == "assistant" for message in said)) for said in completions]


@pytest.mark.parametrize(
    ("environment", "answers"),
    [
        (Echo, 2),
        ({"path": Echo, "options": {"turns": 3}, "limits": {"turns": 2}}, 2),
        ("echo.py:Echo", 2),
    ],
)
def test_an_environment_of_several_turns_trains(environment: Any, answers: int) -> None:
    """Plays end when it says so, or at `limits.turns`; one whose answer was cut off ends there."""
    Path("echo.py").write_text(
        'class Echo:\n    """A person who answers once."""\n'
        "    said = 0\n"
        "    def user(self, message: str) -> str | None:\n"
        "        self.said += 1\n"
        "        return 'Go on.' if self.said == 1 else None\n"
    )
    tasks = [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(4)]
    keys = {**GRPO, "tasks": tasks, "rewards": turns, "environment": environment, "sampling": {"max_tokens": 24}}
    run = whet.train("grpo", "whet:demo", out="runs/env", quiet=True, **keys)
    assert run.rollouts().reward.max() == answers
    assert set(run.rollouts().outcome) <= {"finished", "truncated"}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: whet.train("grpoo", TINY),
            ConfigError,
            "'grpoo' is no kind of stage and no preset; did you mean 'grpo'?",
        ),
        (
            lambda: whet.train("grpo", TINY, algorithm="dapo", **GRPO),
            ConfigError,
            "algorithm is 'dapo', and the method is",
        ),
        (
            lambda: sft(learning_rate=1),
            ConfigError,
            "Python: stages.sft.learning_rate: unknown key; .* 'train.lr' here",
        ),
        (lambda: sft(data=[{"prompt": object()}]), DataError, "rows from Python: Object of type object is not JSON"),
        (
            lambda: sft(data=[{"prompt": "a", "completio": "b"}]),
            DataError,
            "given/.*jsonl:1: completion: no such column",
        ),
        (lambda: whet.Run("nowhere"), RunError, "nowhere: there is no run"),
        (lambda: whet.run("none.yaml"), ConfigError, "none.yaml: no such recipe"),
        (
            lambda: whet.train("grpo", TINY, rewards=length, environment="no.py:Guess", **GRPO),
            ConfigError,
            "environment: no.py does not exist",
        ),
        (
            lambda: whet.train("grpo", TINY, rewards=length, environment=dict, **GRPO),
            ConfigError,
            "environment: dict has no method start",
        ),
    ],
)
def test_mistakes_are_one_line(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- RUN, RUN@stage


def test_a_run_is_a_model_wherever_one_is_named() -> None:
    run = sft()
    for name in ("runs/sft", "runs/sft@sft"):
        keys = {**SFT, "train": {"steps": 1, "batch_size": 4, "lr": 0}}
        again = whet.train("sft", name, out=f"runs/{name[5:]}-again", quiet=True, **keys)
        for key, value in weights(run.model()).items():
            assert np.array_equal(value, weights(again.model())[key])
    with pytest.raises(RunError, match="runs/sft: has no stage 'sff'; did you mean 'sft'"):
        whet.train("sft", "runs/sft@sff", out="runs/other", quiet=True, **SFT)
    with pytest.raises(ModelError, match=r"runs/sfy: no such directory, .*; did you mean 'runs/sft'"):
        whet.train("sft", "runs/sfy", out="runs/other", quiet=True, **SFT)


def test_a_run_that_is_not_finished_is_talked_to_by_its_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter, so that the checkpoint is not a whole model."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    second = {
        "kind": "sft",
        "data": "rows.jsonl",
        "train": {"steps": 9, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
    }
    first = {"kind": "sft", **SFT, "data": "rows.jsonl"}
    recipe = {"name": "two", "model": TINY, "stages": {"first": first, "second": second}}
    folder, greedy = Path("runs/two"), SamplingConfig(temperature=0, max_tokens=4)
    whet.run({**recipe, "stages": {"first": first}}, quiet=True)
    (folder / "recipe.json").write_text(json.dumps(load_recipe(recipe).recipe.model_dump(mode="json")))
    about = open_conversation("runs/two", greedy).about
    assert about == "runs/two (runs/two/stages/01-first/model), while second has no checkpoint yet"

    @contextmanager
    def stops_in_second(console: Console) -> Iterator[Any]:
        yield (folder / "stages" / "02-second" / "metrics.jsonl").is_file

    monkeypatch.setattr("whet.launch.main.asked_to_stop", stops_in_second)
    with pytest.raises(KeyboardInterrupt):
        whet.run(recipe, quiet=True)
    assert whet.Run(folder).stages == {"first": "done", "second": "begun"}
    session = whet.Run(folder).chat(temperature=0, max_tokens=4)
    assert session.about == "runs/two@second, not finished: its checkpoint after step 1"
    with pytest.raises(ModelError, match=r"trained with another chat template than whet:tags \(line 1 is"):
        open_conversation("runs/two", greedy, chat_template=Path("whet:tags"))
    saved = load_file(folder / "checkpoints" / "02-second" / "step-00000001" / "weights.safetensors")
    used = session.policy.trainer.model.parameters
    assert saved.keys() == used.keys() and all(np.array_equal(saved[k], used[k].detach().numpy()) for k in saved)
    assert isinstance(session.say("1+1"), str)
    with pytest.raises(RunError, match=r"its stage second has made no model yet; .*, or take @first"):
        whet.Run(folder).model("second")


def test_no_door_takes_a_trained_model_with_another_chat_template() -> None:
    """Chat, evaluation, held-out loss and a further stage, each with the first line that differs."""
    run = sft()
    other, refused = (
        "model.chat_template=whet:tags",
        r"was trained with another chat template than whet:tags \(line 1 is ",
    )
    asked = {"kind": "eval", "tasks": {"generate": "arithmetic", "count": 2}, "rewards": [{"kind": "verifier"}]}
    asked["models"] = {"base": "@model"}
    recipe = load_recipe({"name": "e", "model": "whet:tiny", "stages": {"eval": asked}}, [other])
    further = {"name": "f", "model": "runs/sft", "stages": {"sft": {"kind": "sft", **SFT, "data": "rows.jsonl"}}}
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for door in (
        lambda: open_conversation("runs/sft", SamplingConfig(), chat_template=Path("whet:tags")),
        lambda: evaluate(recipe, {"sft": "runs/sft"}, quiet=True),
        lambda: evaluate(load_rows(Path("rows.jsonl"), {"sft": "runs/sft"}, [other]), {"sft": "runs/sft"}, quiet=True),
        lambda: whet.run(further, other, quiet=True),
    ):
        with pytest.raises(ModelError, match=refused):
            door()
    tiny = ModelConfig(path="whet:tiny")
    with pytest.raises(ModelError, match=r"whet:tags is not that of whet:tiny \(line 1 is"):
        require_same_template(tiny.model_copy(update={"chat_template": Path("whet:tags")}), tiny)
    lock = json.loads((run.model() / "config.json").read_text())["whet_template"]
    assert lock == (run.model() / "chat_template.jinja").read_text()


def test_chat_says_what_it_is_and_forgets_when_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sft()
    monkeypatch.setattr("sys.stdin", StringIO("Hello\nHello\n/rest\n/reset\nHello\n"))
    assert cli("chat", "runs/sft", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "3") == 0
    output = capsys.readouterr()
    said = output.err.splitlines()
    assert said[0].startswith("model: runs/sft (runs/sft/stages/01-sft/model); float32, 4,096 tokens at most")
    assert said[1:3] == [
        "an answer ends with <|im_end|>",
        "sampling: greedy, at most 3 tokens, seed 0",
    ]
    assert said[3:] == ["/rest: no such command; there is /reset"]
    session = open_conversation("runs/sft", SamplingConfig(temperature=0, max_tokens=3), system="Be brief.")
    first, second = session.say("Hello"), session.say("Hello")
    assert [message.role for message in session.messages] == ["system", *["user", "assistant"] * 2]
    session.reset()
    assert session.messages == [] and session.say("Hello") == first
    shown = output.out.encode("unicode_escape")
    assert (
        cli("chat", "runs/sft", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "3", "-p", "Hello") == 0
    )
    assert (
        shown.startswith(capsys.readouterr().out.encode("unicode_escape").removesuffix(b"\\n")) and second is not None
    )


# ------------------------------------------------------------------------------------------- held-out numbers


def test_held_out_loss_is_what_training_logged() -> None:
    """`whet eval` of a recipe, and of a file of rows, gives the `eval_loss` of the last step; the start is worse."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "name": "held",
        "model": TINY,
        "stages": {
            "sft": {"kind": "sft", "data": "rows.jsonl", "eval_data": "rows.jsonl", "train": {"steps": 8, "lr": 0.01}}
        },
    }
    run = whet.run(recipe, quiet=True)
    logged = run.metrics().eval_loss.dropna().iloc[-1]
    start, trained = evaluate(load_recipe(recipe), {}, quiet=True)["rows"]
    assert (start["label"], trained["label"]) == ("start", "sft")
    assert trained["loss"] == pytest.approx(logged, abs=1e-6) and trained["low"] < logged < trained["high"]
    assert trained["change"] == pytest.approx(trained["loss"] - start["loss"])
    assert trained["change_low"] < trained["change"] < trained["change_high"] < 0
    models = {"made": "runs/held", "demo": "whet:demo"}
    made, demo = evaluate(load_rows(Path("rows.jsonl"), models, ["out=runs/eval"]), models, quiet=True)["rows"]
    assert made["loss"] == pytest.approx(logged, abs=1e-6) and (made["rows"], made["perplexity"]) == (
        8,
        pytest.approx(np.exp(logged), rel=1e-5),
    )
    assert demo["change"] == pytest.approx(demo["loss"] - made["loss"])
    other = loss_table({"a": [(2.0, 2, 7), (1.0, 1, 8)], "b": [(4.0, 4, 9), (2.0, 2, 10)]})["rows"]
    assert [row["loss"] for row in other] == [1.0, 1.0] and other[1]["change"] is None, "other tokens: no pairs"
    with pytest.raises(ConfigError, match=r"rows.jsonl: these are rows; say which models read them"):
        load_rows(Path("rows.jsonl"), {}, ())


def test_runs_are_compared_by_what_they_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Gains are paired by task: their mean is the difference of the accuracies, and no others have one."""
    evaluation = {"kind": "eval", "rewards": [{"kind": "verifier"}], "samples": 2, "sampling": {"max_tokens": 6}}

    def run(out: str, count: int, seed: int) -> str:
        tasks = {"generate": "arithmetic", "digits": 1, "count": count}
        stages = {"eval": {**evaluation, "tasks": tasks}}
        return str(
            whet.run(
                {"name": "e", "model": "whet:demo", "seed": seed, "stages": stages}, f"out={out}", quiet=True
            ).folder
        )

    names = [run("a", 12, 0), run("runs/b", 12, 1), run("c", 8, 0)]
    found = compare_runs(names)
    assert found["differing"] == {"seed": [0, 1, 0], "stages.eval.tasks.count": [12, 12, 8]}
    (first, second, third) = found["tables"]["eval: model"]["rows"]
    assert [row["label"] for row in (first, second, third)] == names
    assert (first["gain"], third["gain"]) == (None, None)
    assert second["gain"] == pytest.approx(second["accuracy"] - first["accuracy"])
    (mean,) = found["means"]
    assert mean["runs"] == names[:2] and mean["mean"] == pytest.approx((first["accuracy"] + second["accuracy"]) / 2)
    assert cli("compare", *names) == 0
    assert "stages.eval.tasks.count" in capsys.readouterr().out
    assert cli("compare", "a", "runs/bb") == 6
    assert capsys.readouterr().err == "whet: runs/bb: there is no run (no recipe.json); did you mean 'runs/b'?\n"
