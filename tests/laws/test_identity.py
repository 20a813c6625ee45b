"""Law: what a stage follows from is compared when it is skipped and when it is gone on with, for every kind of stage.

A changed file, model, template or function is named and refused, unless it is accepted by name; a folder belongs to a
recipe only once a stage has begun to train.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

import whet.files
from whet.config import GeneratedConfig, Stage
from whet.config.environment import EnvironmentConfig
from whet.config.loading import load_recipe
from whet.config.model import ModelConfig
from whet.envs.families import FAMILIES, family
from whet.errors import ConfigError, DataError, RunError
from whet.files import Digests, is_sealed, read_json, write_json
from whet.launch.world import LocalWorld
from whet.models.locate import BUILT_IN
from whet.models.tokenizer import load_tokenizer
from whet.pipeline.identity import differences, section_identity
from whet.pipeline.lineage import Choices
from whet.pipeline.run import Run, run_recipe
from whet.pipeline.stage import Interrupted
from whet.tracking.console import Console

HEAD = """
name: changed
model: {path: model, chat_template: chat.jinja}
save: {every: 1}
stages:
"""
PLAYED = """tasks: {path: tasks.jsonl}
    sampling: {max_tokens: 40}"""
SCORED = f"""{PLAYED}
    rewards: [{{kind: function, path: "judge.py:reward", verifies: true}}]"""
LEARNED = f"""{SCORED}
    prompts_per_step: 2
    rollouts_per_prompt: 2
    train: {{steps: 3}}"""
KINDS: dict[str, tuple[str, str]] = {
    "sft": (
        """data: {path: rows.jsonl}
    eval_data: {path: held_out.jsonl}
    train: {batch_size: 2, steps: 3}""",
        "data eval_data model model.chat_template",
    ),
    "preference": (
        """data: {path: pairs.jsonl}
    train: {batch_size: 2, steps: 3}""",
        "data model model.chat_template",
    ),
    "reward_model": (
        """data: {path: pairs.jsonl}
    hold_out: 0
    train: {batch_size: 2, steps: 3}""",
        "data model model.chat_template",
    ),
    "online_preference": (LEARNED, "tasks rewards.0 model"),
    "rl": (
        f"""{LEARNED}
    algorithm: {{preset: ppo, minibatches: 1, critic: {{model: {{path: critic}}}}}}""",
        "tasks rewards.0 algorithm.critic.model model model.chat_template",
    ),
    "eval": (
        f"""{SCORED}
    models: {{a: model, b: model}}
    samples: 1""",
        "tasks rewards.0 models.a models.a.chat_template",
    ),
    "compare": (
        f"""{PLAYED}
    judge: {{model: {{script: "judge.py:longer"}}}}
    chunk: 2""",
        "tasks judge.model model",
    ),
    "step_labels": (
        f"""{SCORED}
    samples: 1
    rollouts: 1
    chunk: 2""",
        "tasks rewards.0 model",
    ),
    "sample": (
        f"""{SCORED}
    samples: 1
    chunk: 2""",
        "tasks rewards.0 model",
    ),
    "select": (
        """data: {path: rows.jsonl}
    rewards: [{kind: function, path: "judge.py:reward", verifies: true}]""",
        "data rewards.0",
    ),
    "revise": (
        """tasks: {path: tasks.jsonl}
    principles: principles.txt
    writer: {script: "judge.py:writes"}
    max_tokens: 40
    chunk: 2""",
        "tasks principles writer model",
    ),
    "questions": (
        """data: {path: pairs.jsonl}
    teacher: {script: "judge.py:longer"}
    chunk: 2""",
        "data teacher",
    ),
    "agreement": (
        """data: {path: pairs.jsonl}
    judge: {model: {script: "judge.py:longer"}}
    chunk: 2""",
        "data judge.model",
    ),
    "distill": (
        """teacher: critic
    data: {path: rows.jsonl}
    eval_data: {path: held_out.jsonl}
    tasks: {path: tasks.jsonl}
    prompts_per_step: 2
    sampling: {max_tokens: 8}
    train: {batch_size: 2, steps: 3}""",
        "data eval_data tasks teacher model model.chat_template",
    ),
    "merge": ("inputs: [model, critic]", "inputs.0 inputs.1"),
}
"""Its keys, and the names of all that it reads."""
FILES = {
    "data": "pairs.jsonl",
    "eval_data": "held_out.jsonl",
    "tasks": "tasks.jsonl",
    "model": "model/config.json",
    "models.a": "model/tokenizer_config.json",
    "model.chat_template": "chat.jinja",
    "models.a.chat_template": "chat.jinja",
    "algorithm.critic.model": "critic/model.safetensors",
    "inputs.0": "model/config.json",
    "inputs.1": "critic/model.safetensors",
    "principles": "principles.txt",
}
"""By the name of an input: the file that changes (else it is the functions')."""
OWN = {
    ("sft", "data"): "rows.jsonl",
    ("select", "data"): "rows.jsonl",
    ("distill", "data"): "rows.jsonl",
    ("distill", "teacher"): "critic/model.safetensors",
}
"""The same of one kind."""
AT_ONCE = ("merge", "select")
"""Kinds that are done before they could be stopped."""
FUNCTIONS = """
def reward(completions, **_):
    return [float(i % 2) for i in range(len(completions))]

def longer(messages):
    from whet.envs.judges.rules import longer
    return longer(messages)

def writes(messages):
    return "a b c"
"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a stage may read."""
    monkeypatch.chdir(tmp_path)
    demo = BUILT_IN["whet:demo"]
    for name in ("model", "critic"):
        shutil.copytree(demo, name)
    Path("chat.jinja").write_text(load_tokenizer(ModelConfig(path="whet:demo")).chat_template)
    generated = family(GeneratedConfig(generate="arithmetic", digits=1))
    prompts = [generated.task(i).messages[-1].content for i in range(6)]
    write_rows("tasks.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in prompts])
    for name in ("rows.jsonl", "held_out.jsonl"):
        write_rows(name, [{"prompt": prompt, "completion": f"It is {i}."} for i, prompt in enumerate(prompts)])
    write_rows("pairs.jsonl", [{"prompt": p, "chosen": "yes, it is", "rejected": "no"} for p in prompts])
    Path("judge.py").write_text(FUNCTIONS)
    Path("principles.txt").write_text("Be right.\nBe brief.\n")
    return tmp_path


def write_rows(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    *words: str, accept: tuple[str, ...] = (), restart: tuple[str, ...] = (), stopped: Callable[[], bool] | None = None
) -> Run:
    recipe = load_recipe("recipe.yaml", words).recipe
    found = Run(recipe=recipe, folder=Path("run"))
    choices = Choices(accept=accept, restart=restart)
    run_recipe(found, LocalWorld(), Console(quiet=True), stopped or (lambda: False), about={}, choices=choices)
    return found


def begin(*words: str) -> None:
    """Run until something is there to go on from."""
    recipe = load_recipe("recipe.yaml", words).recipe
    with pytest.raises(Interrupted):
        run(*words, stopped=lambda: Run(recipe=recipe, folder=Path("run")).has_begun)


def changed(file: Path) -> None:
    """The same file, one space longer: a comment to Python, a blank line to a list, white space to JSON."""
    file.write_bytes(file.read_bytes().rstrip(b"\n") + b" \n\n")


def test_every_kind_is_here() -> None:
    assert set(KINDS) == {get_args(model.model_fields["kind"].annotation)[0] for model in get_args(get_args(Stage)[0])}


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_changed_is_named_and_refused(inputs: Path, kind: str) -> None:
    keys, names = KINDS[kind]
    Path("recipe.yaml").write_text(f"{HEAD}  s:\n    kind: {kind}\n    {keys}\n")
    if kind not in AT_ONCE:
        begin()
        refuses_every_change(kind, names.split())
    assert is_sealed(run().stage_folder("s"))
    refuses_every_change(kind, names.split())
    run()


def refuses_every_change(kind: str, names: list[str]) -> None:
    for name in names:
        file = Path(OWN.get((kind, name)) or FILES.get(name, "judge.py"))
        before = file.read_bytes()
        changed(file)
        with pytest.raises(RunError) as refused:
            run()
        message = str(refused.value)
        assert f": s: {name} (" in message or f"), {name} (" in message, message
        assert file.name in message and f"--accept s.{name}" in message and "--restart s" in message
        file.write_bytes(before)


# ----------------------------------------------------------------------------------------- what may be done


SFT = "  s:\n    kind: sft\n    data: {path: rows.jsonl}\n    train: {batch_size: 2, steps: 3}\n"
THEN = """  t:
    kind: preference
    data: {path: pairs.jsonl}
    train: {batch_size: 2, steps: 2}
"""


def test_files_that_an_environments_options_name_are_inputs(inputs: Path) -> None:
    Path("stock.json").write_text("[1]")
    config = EnvironmentConfig(path="shop.py:Shop", options={"stock": "stock.json", "size": 3, "name": "v1.2"})

    def now() -> dict[str, Any]:
        with Digests(Path("digests.json")) as digests:
            return section_identity(config, "environment", digests)

    before = now()
    assert before["config"]["environment.options.stock"] == "stock.json"
    assert differences(before, now()) == []
    changed(Path("stock.json"))
    (found,) = differences(before, now())
    assert (found.key, found.what) == ("environment.options.stock.file", "stock.json has changed")
    assert found.accepted("rl", ["rl.environment.options.stock"])
    Path("stock.json").unlink()
    assert differences(before, now()) == [], "a file that is gone is not compared"


def test_an_accepted_change_is_gone_on_with_and_noted(inputs: Path) -> None:
    Path("recipe.yaml").write_text(HEAD + SFT)
    begin()
    changed(Path("rows.jsonl"))
    for wrong in ("dat", "data.path", "train", "t.data"):
        with pytest.raises(RunError, match=r"data \(rows.jsonl has changed: 6 rows then, 7 now\)"):
            run(accept=(wrong,))
    with pytest.raises(RunError, match=r"train.lr \(was 1e-05 and is 0.5\)"):
        run("train.lr=0.5", accept=("data",))
    made = run("train.lr=0.5", accept=("s.data", "train"))
    accepted = {"data": "rows.jsonl has changed: 6 rows then, 7 now", "train.lr": "was 1e-05 and is 0.5"}
    assert read_json(made.stage_folder("s") / "stage.json")["accepted"] == [accepted]
    run("train.lr=0.5")
    with pytest.raises(RunError, match=r"train.lr \(was 0.5 and is 1e-05\)"):
        run()


def test_a_stage_that_is_started_over_takes_along_what_read_it(inputs: Path) -> None:
    Path("recipe.yaml").write_text(
        HEAD + SFT + THEN + THEN.replace("t:", "u:").replace("data:", "model: model\n    data:")
    )
    made = run()
    times = {name: (made.stage_folder(name) / "manifest.json").stat().st_mtime_ns for name in "stu"}
    changed(Path("rows.jsonl"))
    with pytest.raises(ConfigError, match="--restart w: no such stage; there are s, t, u"):
        run(restart=("w",))
    run(restart=("s",))
    again = {name: (made.stage_folder(name) / "manifest.json").stat().st_mtime_ns for name in "stu"}
    assert [again[name] != times[name] for name in "stu"] == [True, True, False]


def test_what_was_made_from_another_result_differs(inputs: Path) -> None:
    """A stage was redone behind the run's back: what read it is not what it was."""
    Path("recipe.yaml").write_text(HEAD + SFT + THEN)
    made = run()
    changed(Path("rows.jsonl"))
    shutil.rmtree(made.stage_folder("s"))
    with pytest.raises(RunError, match=r"t: model \(model.safetensors has changed"):
        run("stages.s.train.lr=0.5")


def test_where_and_how_fast_may_change(inputs: Path) -> None:
    Path("recipe.yaml").write_text(HEAD + SFT.replace("steps: 3", "steps: 5"))
    begin()
    shutil.move("rows.jsonl", "moved.jsonl")
    shutil.move("model", "elsewhere")
    words = "stages.s.data.path=moved.jsonl", "model=elsewhere", "train.microbatch_tokens=64", "name=other"
    later = Path("run/checkpoints/01-s/step-00000003")
    with pytest.raises(Interrupted):
        run(*words, "train.gradient_checkpointing=true", stopped=later.exists)
    assert read_json(later / "trainer.json") == {
        "asked": 64,
        "microbatch_tokens": 64,
        "precision": "float32",
    }
    run(*words)
    Path("moved.jsonl").unlink()
    run(*words)


# ------------------------------------------------------------------------------------ whose folder it is


def _stop(*_: object, **__: object) -> None:
    raise Interrupted


def test_a_folder_belongs_to_nothing_until_a_stage_has_begun_to_train(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for a bad row, stopped before a step, with other stages, another seed: the mended recipe is taken."""
    Path("recipe.yaml").write_text(HEAD + THEN + SFT.replace("s:", "first:", 1))
    good = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(good + '{"prompt": 3}\n')
    with pytest.raises(DataError):
        run("seed=4")
    Path("pairs.jsonl").write_text(good)
    with monkeypatch.context() as patched:
        patched.setattr("whet.pipeline.stages.preference.drive", _stop)
        with pytest.raises(Interrupted):
            run("stages.t.train.lr=1")
    assert Path("run/stages/01-t/reference").is_dir()
    Path("recipe.yaml").write_text(HEAD + SFT)
    made = run()
    assert [folder.name for folder in Path("run/stages").iterdir()] == ["01-s"]
    assert read_json(Path("run/run.json"))["seed"] == 0 and is_sealed(made.stage_folder("s"))


def test_a_folder_with_stages_of_another_recipe_is_refused(inputs: Path) -> None:
    Path("recipe.yaml").write_text(HEAD + SFT)
    run()
    before = Path("run/recipe.json").read_text()
    Path("recipe.yaml").write_text(HEAD + THEN + SFT)
    with pytest.raises(RunError, match=r"made by another recipe, which has the stage 01-s \(this one has 01-t, 02-s\)"):
        run()
    assert Path("run/recipe.json").read_text() == before


def test_a_stage_can_be_added_after_those_that_are_done(inputs: Path) -> None:
    Path("recipe.yaml").write_text(HEAD + SFT)
    run()
    Path("recipe.yaml").write_text(HEAD + SFT + THEN)
    assert is_sealed(run().stage_folder("t"))
    assert set(read_json(Path("run/recipe.json"))["stages"]) == {"s", "t"}


def test_a_stage_without_an_identity_is_not_taken_on_trust(inputs: Path) -> None:
    Path("recipe.yaml").write_text(HEAD + SFT)
    noted = run().stage_folder("s") / "stage.json"
    write_json(noted, {"name": "s", "kind": "sft"})
    with pytest.raises(RunError, match=r"s: identity \(the version of whet that made it noted none\)"):
        run()
    run(accept=("identity",))


# ------------------------------------------------------------------------------------------- digests


def test_a_file_is_hashed_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, known = tmp_path / "file", tmp_path / "digests.json"
    read: list[Path] = []
    plain = whet.files.digest_file
    monkeypatch.setattr("whet.files.digest_file", lambda file: read.append(file) or plain(file))
    monkeypatch.setattr("whet.files.SETTLED_NS", 0)
    for content in (b"one\ntwo", b"one\ntwO", b""):
        file.write_bytes(content)
        time.sleep(0.02)  # one tick of the clock of the file system
        os.utime(file, ns=(10**18, 10**18))
        read.clear()
        for _ in range(2):
            with Digests(known) as digests:
                digest = digests.of(file)
            assert digest.sha256 == hashlib.sha256(content).hexdigest()
            assert (digest.bytes, digest.lines) == (len(content), len(content.splitlines()))
        assert read.count(file) == 1, "the second time it is known, though its time of modification never moved"
    monkeypatch.setattr("whet.files.SETTLED_NS", 10**18)
    file.write_bytes(b"new")
    read.clear()
    known.write_text("{")
    for _ in range(2):
        with Digests(known) as digests:
            assert digests.of(file).sha256 == hashlib.sha256(b"new").hexdigest()
    assert read.count(file) == 2, "a file of a moment ago is not remembered"


VERSIONS: Mapping[str, tuple[int, str]] = {
    "arithmetic": (1, "8c08e7a4bd107e02"),
    "countdown": (1, "f8ed0589583e654c"),
    "functions": (1, "1d4d1845eae2a1e5"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_problems_are_another_version(name: str) -> None:
    """Where this fails, raise the family's `version`: what was made from it before is something else."""
    config = GeneratedConfig.model_validate({"generate": name})
    generated = family(config)
    told = [
        [generated.task(i).messages[-1].content, generated.demonstration(i)[-1].content, *generated.ranking(i)]
        for i in range(20)
    ]
    assert (FAMILIES[name].version, hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]) == VERSIONS[name]
