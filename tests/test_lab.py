"""`whet reward` and `whet regrade`: what rewards give to what deserves nothing, and verdicts that change."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from whet.cli.app import main
from whet.config.loading import load_recipe
from whet.errors import ConfigError, DataError, RunError
from whet.launch.lab import _added, _said, regrade, try_rewards
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld
from whet.pipeline.run import Run
from whet.pipeline.run import run_recipe as run_pipeline
from whet.pipeline.stage import Interrupted
from whet.records import Message, Score
from whet.rollouts.play import Player
from whet.tracking.console import Console

RECIPE = """\
name: lab
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
out: run
stages:
  rl:
    kind: rl
    tasks: {generate: arithmetic, count: 40, digits: 1}
    rewards: [{kind: verifier, name: accuracy}, {kind: format, weight: 0.1}]
    algorithm: grpo
    prompts_per_step: 4
    rollouts_per_prompt: 2
    sampling: {max_tokens: 8}
    train: {steps: 2}
  eval:
    kind: eval
    models: {start: "@model", rl: "@rl"}
    tasks: {generate: arithmetic, count: 6, digits: 1, split: test}
    rewards: [{kind: verifier}]
    sampling: {max_tokens: 8}
"""
FUNCTIONS = """
def says(completions, answer, **columns):
    return [float(gold.split("#### ")[-1] in text) for text, gold in zip(completions, answer)]

def breaks(completions, **columns):
    if any("another side" in text for text in completions):
        raise KeyError("gold")
    return [0.0 for _ in completions]

def long(completions, **columns):
    return [float(len(text[-1]["content"]) > 3) for text in completions]
"""


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its bytes."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    made = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        Path("r.yaml").write_text(RECIPE)
        Path("f.py").write_text(FUNCTIONS)
        run_recipe(load_recipe("r.yaml"), quiet=True)
    return made


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def tried(*overrides: str, **asked: Any) -> dict[str, Any]:
    return try_rewards(load_recipe("r.yaml", overrides), quiet=True, **{"stage": "rl", "limit": 10, **asked})


def rows(*answers: str) -> str:
    lines = [json.dumps({"prompt": f"What is number {i}?", "answer": said}) for i, said in enumerate(answers)]
    Path("rows.jsonl").write_text("\n".join(lines))
    return "stages.rl.tasks={path: rows.jsonl}"


def test_golds_are_worth_most_and_what_deserves_nothing_is_named() -> None:
    found = tried()
    sources = found["sources"]
    assert {name: each["answers"] for name, each in sources.items()} == {
        **dict.fromkeys(("gold", "gold in tags", "empty", "rambling", "format only", "commonest gold"), 10),
        **dict.fromkeys(("several golds", "prompt copied", "says it is right"), 10),
        "rollouts": 8,
    }
    assert sources["gold in tags"]["mean"] == pytest.approx(1.1) and sources["gold"]["right"] == 1.0
    assert sources["empty"]["mean"] == 0 and sources["format only"]["mean"] == pytest.approx(0.1)
    assert found["wins_with"] == max(
        (name for name in sources if name not in ("gold", "gold in tags", "rollouts")), key=lambda n: sources[n]["mean"]
    )
    assert all(sum(each["histogram"]) == each["answers"] for each in sources.values())
    assert found["range"] == (0.0, pytest.approx(1.1)) and found["refused"] == {}
    assert all(each["worst_ms"] >= each["mean_ms"] > 0 for each in found["rewards"].values())


def test_a_models_answers_and_saved_ones_tell_how_many_tasks_teach() -> None:
    found = tried(samples=3)["sources"]
    assert (found["sampled"]["answers"], found["rollouts"]["answers"]) == (30, 8)
    for name in ("sampled", "rollouts"):
        assert 0 <= found[name]["all_right"] + found[name]["all_wrong"] <= 1
    assert tried(rollouts=Path("run"), limit=32)["sources"]["rollouts"]["answers"] == 16, "the last two steps"
    with pytest.raises(RunError, match="elsewhere: holds no rollouts of rl"):
        tried(rollouts=Path("elsewhere"))


def test_golds_are_found_where_rewards_or_functions_look_for_them() -> None:
    data = rows("It is #### 3", "#### 4", "#### 4")
    rewards = "stages.rl.rewards=[{kind: math}, {kind: function, path: 'f.py:says', verifies: true, weight: 0}]"
    found = tried(data, rewards)
    assert found["sources"]["gold"]["right"] == found["sources"]["gold in tags"]["right"] == 1.0
    assert found["sources"]["commonest gold"]["right"] == pytest.approx(2 / 3)
    (apart,) = found["disagreements"]
    assert apart["rewards"] == ["math", "says"] and apart["apart"] == len(apart["examples"]) == 3
    assert all(each["says"] > each["math"] for each in apart["examples"]), "a list of boxes holds every gold"


def test_golds_that_cannot_be_met_and_functions_that_break_are_named() -> None:
    refused = tried(rows("#### 3", "Paris"), "stages.rl.rewards=[{kind: math}]")
    assert refused["tasks"] == 1 and list(refused["refused"]) == ["rows.jsonl:2"]
    assert "is text, not mathematics" in refused["refused"]["rows.jsonl:2"]
    with pytest.raises(DataError, match="no task can be used; 1 row dropped"):
        tried(rows("Paris"), "stages.rl.rewards=[{kind: math}]")
    wrong = tried(rows("3"), "stages.rl.rewards=[{kind: function, path: 'f.py:breaks', verifies: true}]")
    assert wrong["refused"] == {"rows.jsonl:1": "'3' is not right; "}
    (note,) = wrong["sources"]["rambling"]["broke_a_grader"]
    assert "KeyError: 'gold'" in note and wrong["sources"]["empty"]["broke_a_grader"] == []
    failed = tried(rows("3"), "stages.rl.rewards=[{kind: function, path: 'f.py:long'}]")
    assert failed["rewards"]["long"]["failures"] == failed["sources"]["gold"]["answers"] * len(failed["sources"])
    assert "TypeError" in failed["rewards"]["long"]["first_failure"]


def test_grading_again_changes_no_verdict_and_not_a_byte() -> None:
    before = digest(Path("run"))
    found = regrade(Path("run"), stage="rl", quiet=True)
    assert found == {"stage": "rl", "rollouts": 16, "changed": {"accuracy": 0, "format": 0}, "changes": []}
    assert regrade(Path("run"), stage="eval", quiet=True)["rollouts"] == 48, "six tasks, four samples, two models"
    assert regrade(Path("run"), stage="rl", last=1, quiet=True)["rollouts"] == 8
    assert digest(Path("run")) == before


def test_what_another_reward_says_is_told_by_name_with_its_reason() -> None:
    other = "stages.rl.rewards=[{kind: function, path: 'f.py:long', name: accuracy}, {kind: language}]"
    found = regrade(Path("run"), overrides=[other], stage="rl", quiet=True)
    assert sum(found["changed"].values()) == len(found["changes"])
    accuracy = [each for each in found["changes"] if each["reward"] == "accuracy"]
    assert accuracy and all((each["old"], each["new"]) == (0.0, 1.0) for each in accuracy)
    new = [each for each in found["changes"] if each["reward"] == "language"]
    assert new and {(each["old"], each["reason"]) for each in new} == {(None, "no reward of the run")}
    Path("other.yaml").write_text(RECIPE.replace("{kind: format, weight: 0.1}", "{kind: format, form: think}"))
    assert regrade(Path("run"), recipe=Path("other.yaml"), stage="rl", quiet=True)["rollouts"] == 16
    with pytest.raises(RunError, match="run: holds no rollouts of rl with tasks of the recipe"):
        regrade(Path("run"), overrides=["stages.rl.tasks.seed=9", "stages.rl.tasks.digits=5"], stage="rl", quiet=True)


def test_a_damaged_rollout_file_is_named(tmp_path: Path) -> None:
    copy = shutil.copytree("run", tmp_path / "copy")
    file = copy / "stages" / "01-rl" / "rollouts" / "step-000002.parquet"
    file.write_text("x")
    with pytest.raises(RunError, match=r"step-000002\.parquet: not a readable rollout file .*; remove it"):
        regrade(copy, stage="rl", quiet=True)
    file.unlink()
    assert regrade(copy, stage="rl", quiet=True)["rollouts"] == 8


def test_a_note_is_told_apart_by_the_name_of_its_reward() -> None:
    score = Score(value=None, note="math: read 'x; y', gold is '3'; own/part: KeyError: 'a'")
    assert (_said("math", score), _said("own/part", score)) == (["read 'x; y', gold is '3'"], ["KeyError: 'a'"])
    assert _said("part", score) == [] == _said("KeyError", score)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward", "r.yaml"], "lab: several stages have rewards; choose with --stage rl|eval"),
        (["reward", "r.yaml", "--stage", "rll"], "--stage rll: no stage of that name has rewards; did you mean 'rl'?"),
        (["reward", "r.yaml", "--limit", "0"], "Invalid value for '--limit'"),
        (["regrade", "rum"], "rum: no run (it has no recipe.json); give the folder of one, such as runs/NAME"),
        (["regrade", "run", "--stage", "rl", "--recipe", "none.yaml"], "none.yaml: no such recipe"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "-q"])
    error = capsys.readouterr().err
    assert caught.value.code in (2, 6) and said in error and error.count("\n") == 1


def test_a_recipe_without_rewards_has_nothing_to_try() -> None:
    Path("sft.yaml").write_text("name: s\nmodel: whet:demo\nstages: {s: {kind: sft, data: {generate: arithmetic}}}\n")
    with pytest.raises(ConfigError, match="s: no stage has tasks and rewards"):
        try_rewards(load_recipe("sft.yaml"), quiet=True)


def test_the_commands_print_a_table_or_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str) -> list[str]:
        with pytest.raises(SystemExit) as caught:
            main([*words, "-q"])
        assert caught.value.code == 0
        return capsys.readouterr().out.splitlines()

    lines = printed("reward", "r.yaml", "--stage", "rl", "--limit", "4")
    assert lines[0] == "rl: 4 tasks" and "gold" in lines[2] and "does best with" in lines[-1]
    (line,) = printed("reward", "r.yaml", "--stage", "rl", "--limit", "4", "--json")
    assert json.loads(line)["sources"]["gold"]["answers"] == 4
    assert printed("regrade", "run", "--stage", "rl")[1:] == ["accuracy: 0 changed", "format: 0 changed"]
    other = "stages.rl.rewards=[{kind: function, path: 'f.py:long', name: accuracy}]"
    assert " -> 1.0" in printed("regrade", "run", other, "--stage", "rl")[2]


def test_a_stop_in_the_last_chunk_of_an_evaluation_keeps_what_was_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("r.yaml", [f"out={tmp_path}/run", "stages.eval.models={a: '@model', b: '@model'}"]).recipe
    run = Run(recipe=recipe.model_copy(update={"stages": {"eval": recipe.stages["eval"]}}), folder=tmp_path / "run")
    played: list[int] = []
    play = Player.play
    monkeypatch.setattr(Player, "play", lambda self, *a, **k: (played.append(1), play(self, *a, **k))[1])

    def go(stopped: bool) -> None:
        run_pipeline(run, LocalWorld(), Console(quiet=True), lambda: stopped and bool(played), about={"threads": 1})

    with pytest.raises(Interrupted):
        go(stopped=True)
    assert len(played) == 1
    go(stopped=False)
    assert len(played) == 2 and (tmp_path / "run" / "stages" / "01-eval" / "eval.json").is_file()


# ------------------------------------------------------------------------------------------- environments

SHOP = """
class Shop:
    def reset(self, wanted: str):
        return f" Sell a {wanted}."

    def find(self, name: str) -> list[str]:
        \"\"\"Find items.\"\"\"
        return [name]

    def user(self, message: str) -> str | None:
        return "Go on."

    def turn_reward(self) -> float:
        return 0.25

    def reward(self) -> dict[str, float]:
        return {"sold": 0.5, "paid": 0.125}
"""
WITH_TOOLS = """
name: shop
model: {path: "whet:demo", chat_template: "whet:hermes"}
threads: 1
stages:
  rl:
    kind: rl
    tasks: {path: tasks.jsonl}
    environment: {path: "shop.py:Shop", limits: {turns: 2}}
    rewards: [{kind: environment}, {kind: turns, name: to go}, {kind: calls, weight: -0.02}]
    algorithm: turn_rloo
    prompts_per_step: 1
    rollouts_per_prompt: 2
    sampling: {max_tokens: 6, stop: [e, a, o, i, " ", "1", "2"]}
    train: {steps: 1}
"""


def test_plays_with_tools_are_sampled_in_their_environment_and_graded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shop.py").write_text(SHOP)
    Path("shop.yaml").write_text(WITH_TOOLS)
    Path("tasks.jsonl").write_text('{"prompt": "Help.", "wanted": "cup"}\n')
    loaded = load_recipe("shop.yaml", ["out=run"])
    run_recipe(loaded, quiet=True)
    found = try_rewards(loaded, samples=2, rollouts=Path("run"), quiet=True)
    assert found["tasks"] == 1 and found["sources"]["sampled"]["mean"] >= 0.875
    assert found["sources"]["rollouts"]["answers"] == 2
    again = regrade(Path("run"), quiet=True)
    assert again["rollouts"] == 2 and again["changes"] == [], "what the environment said is not asked again"


def test_what_an_environment_adds_to_a_task_is_not_answered() -> None:
    ask, more = (Message(role="user", content=content) for content in ("Help.", "Help. Now."))
    system, answer = Message(role="system", content="Shop"), Message(role="assistant", content="Yes.")
    extra = Message(role="user", content="A cup.")
    assert _added([system, more, extra, answer], [ask], played=True) == (answer,)
    assert _added([ask, answer], [ask], played=False) == (answer,)
    assert _added([more, answer], [ask], played=False) is None
    assert _added([extra, answer], [ask], played=True) is None
    assert _added([system, ask, answer], [system, ask], played=True) == (answer,)
