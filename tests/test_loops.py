"""Loops of stages, and runs as artifacts: rounds, a rule that ends them, resume, reuse, lineage, commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from whet import __version__
from whet.cli.app import main
from whet.config.loading import load_recipe
from whet.config.loops import LoopConfig
from whet.errors import ConfigError, ModelError, RunError
from whet.files import read_json, write_json
from whet.launch.check import check_recipe
from whet.launch.main import run_recipe
from whet.launch.runs import diff, gc, runs_in, show
from whet.launch.world import LocalWorld
from whet.models.locate import made_by
from whet.pipeline.card import model_card, records
from whet.pipeline.lineage import Choices, elsewhere
from whet.pipeline.run import Rounds, Run, context_of, rounds_of
from whet.tracking.console import Console

RECIPE = """
name: loop
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
threads: 1
save: {every: 1}
train: {batch_size: 2, steps: 2}
sampling: {max_tokens: 6}
stages:
  sft: {kind: sft, data: {generate: arithmetic, count: 4, digits: 1}}
  improve:
    repeat: 3
    until: {patience: 1}
    stages:
      ask:
        kind: sample
        tasks: {generate: arithmetic, count: 3, digits: 1}
        authors: [{script: "t.py:right"}]
        samples: 1
        rewards: [{kind: verifier}]
      keep: {kind: select, data: ["@ask", "@improve"], correct: true}
      train: {kind: sft, data: "@keep"}
      judge: {kind: eval, tasks: {generate: arithmetic, count: 2, digits: 1}, rewards: [{kind: verifier}], samples: 1}
  more: {kind: sft, data: {generate: arithmetic, count: 4, digits: 1}}
  eval:
    kind: eval
    models: {sft: "@sft", loop: "@improve", more: "@more"}
    tasks: {generate: arithmetic, count: 2, digits: 1, split: test}
    rewards: [{kind: verifier}]
    samples: 1
"""
TEACHER = """
def right(messages):
    left, second = messages[-1]["content"].split("+")
    return f"<answer>{int(left) + int(second)}</answer>"
"""
DONE = ["sft", *(f"improve-{n}-{stage}" for n in (1, 2) for stage in ("ask", "keep", "train", "judge")), "more", "eval"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and a whole run of it."""
    folder = tmp_path_factory.mktemp("loops")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "t.py").write_text(TEACHER)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        run_recipe(load_recipe("r.yaml", ["out=runs/whole"]), quiet=True)
    return folder


@pytest.fixture(autouse=True)
def _here(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)


def weights(run: str) -> dict[str, str]:
    manifests = sorted(Path(run, "stages").glob("*/manifest.json"))
    read = ((path.parent.name, json.loads(path.read_text())["files"]) for path in manifests)
    return {
        name: files["model/model.safetensors"]["sha256"] for name, files in read if "model/model.safetensors" in files
    }


# ----------------------------------------------------------------------------------------------- recipes


def test_a_loop_is_written_out_and_every_value_keeps_its_place() -> None:
    loaded = load_recipe("r.yaml", ["stages.improve.stages.train.train.lr=0.5"])
    stages = loaded.recipe.stages
    assert [name for name in stages if "-" not in name] == ["sft", "more", "eval"] and len(stages) == 15
    trains = [stages[f"improve-{n}-train"].train for n in (1, 2, 3)]  # type: ignore[union-attr]
    assert {train.lr for train in trains} == {0.5} and {train.steps for train in trains} == {2}, "it inherits"
    origin = loaded.origins["stages.improve-2-ask.samples"]
    line = next(i for i, text in enumerate(RECIPE.splitlines(), start=1) if "samples: 1" in text)
    assert str(origin) == f"r.yaml:{line}"
    sources = [[source.path for source in stages[f"improve-{n}-keep"].data] for n in (1, 2)]  # type: ignore[union-attr]
    assert sources == [["@improve-1-ask"], ["@improve-2-ask", "@improve-1-keep"]], (
        "the first round has no rows before it"
    )
    budgets = {budget.stage: budget for budget in loaded.recipe.budgets()}
    assert budgets["improve-1-train"].all_updates == 6 and "improve-2-train" not in budgets


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("    repeat: 3\n", "", "r.yaml:10: stages.improve.repeat: must be a number of rounds"),
        ("repeat: 3", "repeat: 0", "r.yaml:11: stages.improve.repeat: must be a number of rounds"),
        ("{patience: 1}", "{patence: 1}", "r.yaml:12: stages.improve.until.patence: unknown key; did you mean"),
        ("{patience: 1}", "{patience: null}", "r.yaml:12: stages.improve.until.* must have reach or patience"),
        ("@improve\", more", "@improv\", more", "r.yaml:26: stages.eval.models.loop is @improv.*mean '@improve'"),
        ('"@keep"', '"@kep"', "r.yaml:21: stages.improve.stages.train.data is @kep, .*@improve-1-keep"),
        ('["@ask", "@improve"]', '"@improve"', "stages.improve.stages.keep.data is @improve, .*made later"),
        ('data: "@keep"', 'data: "@ask", lr: 1', "stages.improve.stages.train.lr: unknown key"),
        ("{patience: 1}", "{metric: acuracy}", "until.metric is 'acuracy', .* has accuracy, .*mean 'accuracy'"),
        ("      judge:", "      x: {stages: {}}\n      judge:", "must be a section of stages, none of them a loop"),
        ("  improve:\n", "  model:\n", "r.yaml:10: stages.model: the name model is taken"),
        ("      judge:", "      model:", "stages.improve: the name model is taken"),
        ("      judge:", "      improve:", "stages.improve.stages.improve: has the name of its loop"),
        ("@improve\", more", "@improve/best\", more", "stages.eval.models.loop is @improve/best, .*mean '@improve'"),
        ("kind: eval, tasks", "kind: evl, tasks", "stages.improve.stages.judge.kind: must be one of"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_loop_is_one_line_with_its_place(old: str, new: str, error: str) -> None:
    assert old in RECIPE
    Path("bad.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=error.replace("r.yaml", "bad.yaml")) as caught:
        load_recipe("bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"stages.improve.stages.trian: no such stage; did you mean 'train'"):
        load_recipe("r.yaml", ["stages.improve.stages.trian.train.lr=1"])


@pytest.mark.parametrize(
    ("until", "scores", "rounds"),
    [
        (None, [], (4, 4)),
        ({"patience": 1}, [0.1, 0.2], (4, 2)),
        ({"patience": 1}, [0.1, 0.1], (2, 1)),
        ({"patience": 2}, [0.3, 0.1, 0.2], (3, 1)),
        ({"patience": 1, "min_gain": 0.1}, [0.1, 0.15], (2, 1)),
        ({"patience": None, "reach": 0.5}, [0.2, 0.1, 0.5], (3, 3)),
        ({"metric": "brief"}, [0.2, 0.1], (2, 1)),
    ],
)
def test_the_rule_of_a_loop(until: Any, scores: list[float], rounds: tuple[int, int], tmp_path: Path) -> None:
    config = LoopConfig(repeat=4, until=until, stages=[["a"]] * 4)
    tables = [tmp_path / str(number) for number in range(len(scores))]
    for table, score in zip(tables, scores, strict=True):
        write_json(table, {"rows": [{"accuracy": 0.9 - score if "metric" in (until or {}) else score,
                                     "rewards": {"brief": score}}]})  # fmt: skip
    found = rounds_of(tables, config)
    assert (found.last, found.best) == rounds and bool(found.why) == (rounds[0] < 4 or found.why != "")
    if scores:
        with pytest.raises(ConfigError, match=r"until.metric is 'acuracy', and .* has accuracy, brief"):
            rounds_of(tables, LoopConfig(repeat=4, until={"metric": "acuracy"}, stages=[["a"]]))  # type: ignore[arg-type]
    assert Rounds() == Rounds(last=0, best=0, why="")


# --------------------------------------------------------------------------------------------------- runs


def test_a_loop_ends_by_its_rule_and_what_follows_begins_with_its_best_round() -> None:
    """The tiny model is never right: round 2 is no better than round 1, and there is no round 3."""
    known = {record.name: record for record in records(Path("runs/whole")).values()}
    assert [name for name, record in known.items() if record.state == "done"] == DONE
    assert (
        known["improve-3-train"].state
        == "improve ended after round 2: accuracy 0.000 is no better than 0.000 of round 1"
    )
    assert known["more"].parents["model"].endswith("improve-1-train")
    assert known["eval"].parents["models.loop"].endswith("improve-1-train")
    assert known["improve-2-train"].parents["model"].endswith("improve-1-train"), "a round goes on from the one before"
    rows = [
        len(Path("runs/whole/stages", f"{n}/rows.jsonl").read_text().splitlines())
        for n in ("03-improve-1-keep", "07-improve-2-keep")
    ]
    assert rows == [3, 3], "the second round has the rows of the first, and none twice"
    again = run_recipe(load_recipe("r.yaml", ["out=runs/whole"]), quiet=True)  # everything is done before
    assert again["evaluations"].keys() == {"improve-1-judge", "improve-2-judge", "eval"}
    report = Path("runs/whole/report.html").read_text()
    assert "improve-2-train" in report and report.count(">not run<") == 4
    checks = check_recipe(load_recipe("r.yaml", ["out=runs/other"]))
    assert [check.stage for check in checks] == [name for name in DONE if "improve-2" not in name]


def test_the_model_of_a_run_is_the_one_that_its_last_loop_chose() -> None:
    """`whet chat RUN` and every `model: RUN`: not the round that was made last."""
    stages = RECIPE.partition("  more:")[0]
    Path("short.yaml").write_text(stages)
    run_recipe(load_recipe("short.yaml", ["out=runs/short"]), quiet=True, choices=Choices(reuse=Path("runs/whole")))
    assert sorted(path.name for path in Path("runs/short/stages").glob("*train"))[-1].endswith("improve-3-train")
    assert made_by("runs/short").parent.name.endswith("improve-1-train")
    assert made_by("runs/whole").parent.name.endswith("-more")
    shutil.rmtree("runs/short")


def test_a_loop_that_is_interrupted_goes_on_as_if_it_never_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def die(*_: object) -> None:
        if next(calls) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("whet.tracking.console.Console.log", die)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe("r.yaml", ["out=other/broken"]), quiet=True)
    done = [record.name for record in records(Path("other/broken")).values() if record.state == "done"]
    assert "improve-1-judge" in done and "improve-2-judge" not in done, "it died in the second round"
    run_recipe(load_recipe("r.yaml", ["out=other/broken"]), quiet=True)
    assert {record.state for record in records(Path("other/broken")).values()} > {"done"}
    assert weights("other/broken") == weights("runs/whole")
    with pytest.raises(RunError, match=r"improve-1-keep: correct \(was True and is None\)"):
        run_recipe(load_recipe("r.yaml", ["out=other/broken", "stages.improve.stages.keep.correct=null"]), quiet=True)


def test_identical_work_is_taken_from_another_run_and_nothing_else_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["out=runs/second", "stages.more.train.lr=0.01"]
    run_recipe(load_recipe("r.yaml", words), choices=Choices(reuse=Path("runs")))
    said = capsys.readouterr().err.replace("\n", " ")
    known = {record.name: record for record in records(Path("runs/second")).values()}
    taken = [name for name, record in known.items() if "from" in record.noted]
    assert taken == [name for name in DONE if name not in ("more", "eval")]
    assert "sft: from runs/whole/stages/01-sft, of the same identity" in said
    assert show(Path("runs/second"))["stages"]["sft"]["from"] == "runs/whole/stages/01-sft"
    same, ours = weights("runs/whole"), weights("runs/second")
    assert {name for name in same if same[name] != ours[name]} == {"14-more"}
    folder = Path("runs/second/stages/01-sft")
    assert (folder / "model/model.safetensors").samefile("runs/whole/stages/01-sft/model/model.safetensors")
    damaged = Path("runs/damaged/stages/01-sft")
    shutil.copytree("runs/whole/stages/01-sft", damaged)
    (damaged / "model/config.json").write_text("{}")
    with pytest.raises(RunError, match=r"model/config.json: damaged"):
        run_recipe(load_recipe("r.yaml", ["out=runs/third"]), quiet=True, choices=Choices(reuse=Path("runs/damaged")))
    shutil.rmtree("runs/damaged")
    shutil.rmtree("runs/third")
    changes = diff(Path("runs/whole"), Path("runs/second"))
    assert [line for line in changes["recipe"] if "more" in line] == ["stages.more.train.lr: 1e-05 -> 0.01"]
    assert changes["stages"] == ["eval.models.more: model.safetensors has changed"]
    assert changes["evaluations"][-1].startswith("eval more: +0.0 points (95 % interval ")


def test_what_another_version_made_is_kept_and_offered_and_what_is_gone_is_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe = {**recipe, "stages": {name: recipe["stages"][name] for name in ("sft", "more")}}
    del recipe["sampling"]
    Path("two.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    older = Path("older/run/stages/01-sft")
    shutil.copytree("runs/whole/stages/01-sft", older)
    for room in ("identity", "lineage"):
        monkeypatch.setattr(f"whet.pipeline.{room}.__version__", "9.0.0")

    def said(out: str, *accept: str) -> str:
        choices = Choices(reuse=Path("older"), accept=accept)
        run_recipe(load_recipe("two.yaml", [f"out={out}"]), choices=choices)
        return capsys.readouterr().err.replace("\n", " ")

    offered = said("other/fresh")
    assert f"is of the same identity, but by whet {__version__}; to take it: --accept sft.code" in offered
    assert "sft: from" not in offered
    assert "sft: from older/run/stages/01-sft" in said("other/taken", "sft.code")
    assert f"sft: done before by whet {__version__}" in said("older/run")
    (older.parent / "02-more/manifest.json").unlink()
    shutil.rmtree(older / "model")
    with pytest.raises(RunError, match=r"01-sft/model: is gone, though sft is done; .* --restart sft"):
        said("older/run")


def test_the_card_says_where_a_model_comes_from() -> None:
    stage = Path("runs/whole/stages/14-more")
    card = model_card(Path("runs/whole"), stage / "model")
    for text in ("whet:tiny", "| improve-1-train | sft | ", "seed 0", "| improve-1-ask.tasks | arithmetic, version 1 |",
                 "Accuracy in `eval`, 2 tasks: 0.0%"):  # fmt: skip
        assert text in card
    assert "improve-2" not in card, "it does not come from a round that was no better"
    written = (stage / "model" / "README.md").read_text()
    assert written.splitlines()[:8] == card.splitlines()[:8] and "Accuracy" not in written


BEST = """
name: best
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
threads: 1
sampling: {max_tokens: 4}
stages:
  improve:
    repeat: 2
    stages:
      train:
        kind: sft
        data: {generate: arithmetic, count: 4, digits: 1}
        eval_data: {generate: arithmetic, count: 2, digits: 1, split: test}
        best: {metric: eval_loss}
        train: {batch_size: 2, steps: 2}
      more: {kind: sft, model: "@train/best", data: {generate: arithmetic, count: 4}, best: {metric: eval_loss},
             eval_data: {generate: arithmetic, count: 2, digits: 1}, train: {batch_size: 2, steps: 2}}
  eval:
    kind: eval
    models: {last: "@improve", best: "@improve/best"}
    tasks: {generate: arithmetic, count: 2, digits: 1, split: test}
    rewards: [{kind: verifier}]
    samples: 1
"""


def test_a_loop_has_best_models_each_with_a_card() -> None:
    Path("best.yaml").write_text(BEST)
    loaded = load_recipe("best.yaml", ["out=best"])
    starts = [loaded.recipe.stages[f"improve-{n}-more"].start for n in (1, 2)]
    assert [start and start.path for start in starts] == ["@improve-1-train/best", "@improve-2-train/best"]
    run_recipe(loaded, quiet=True)
    noted = {record.name: record for record in records(Path("best")).values()}
    assert noted["improve-2-more"].inputs["model"]["path"] == "/stages/03-improve-2-train/best"
    assert noted["eval"].inputs["models.best"]["path"] == "/stages/04-improve-2-more/best"
    folder = Path("best/stages/04-improve-2-more/best")
    assert "# best: improve-2-more, the best by held-out data\n" in (folder / "README.md").read_text()
    assert model_card(Path("best"), folder).count("Accuracy in `eval`") == 1


def test_a_finished_round_that_another_rule_leaves_out_stays_what_it_is() -> None:
    shutil.copytree("runs/whole", "other/rule")
    everything = ["out=other/rule", "stages.improve.until.patience=3"]
    run_recipe(load_recipe("r.yaml", everything), quiet=True, choices=Choices(restart=["more"]))
    assert show(Path("other/rule"))["stages"]["improve-3-train"]["state"] == "done"
    run_recipe(load_recipe("r.yaml", ["out=other/rule"]), quiet=True)
    run_recipe(load_recipe("r.yaml", everything), quiet=True)
    assert show(Path("other/rule"))["stages"]["improve-3-train"]["identity"]


def test_what_begins_with_the_best_round_depends_on_its_judges() -> None:
    recipe = load_recipe("r.yaml").recipe
    run, judges = Run(recipe=recipe, folder=Path("runs/whole")), {f"improve-{n}-judge" for n in (1, 2, 3)}
    assert run.reads("more") == {"improve-1-train", *judges}
    assert run.reads("eval") == {"sft", "more", "improve-1-train", *judges}
    assert run.reads("improve-2-train") == {"improve-1-train", "improve-2-keep"}


def test_what_cannot_be_read_is_taken_from_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.pipeline.identity.read_contents", _unreadable)
    shutil.copytree("runs/whole", "unread/whole")
    note = Path("unread/whole/stages/01-sft/stage.json")
    known = read_json(note)
    known["identity"]["inputs"]["model"] = None
    write_json(note, known)
    recipe = load_recipe("r.yaml", ["out=unread/new"]).recipe
    run = Run(recipe=recipe, folder=Path("unread/new"))
    context = context_of(run, "sft", LocalWorld(), Console(quiet=True), lambda: False)
    assert elsewhere(context, recipe.seed, Choices(reuse=Path("unread"))) is None


def _unreadable(*_: Any) -> Any:
    raise ModelError("not here")


def test_room_is_freed_and_nothing_is_lost() -> None:
    shutil.copytree("runs/whole", "runs/copy")
    large = Path("runs/copy/stages/01-sft/metrics.jsonl")  # the tiny model is smaller than what is worth a link
    before = weights("runs/copy")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("whet.launch.runs.SMALL", 100)
        (Path("runs/copy/checkpoints/01-sft/step-00000002")).mkdir(parents=True)
        dry = gc(Path("runs"), dry=True)
        assert not large.samefile("runs/whole/stages/01-sft/metrics.jsonl") and "can be freed" in dry[-1]
        damaged = Path("runs/copy/stages/14-more/model/config.json")
        damaged.write_text("{}")
        gc(Path("runs"), dry=False)
    assert large.samefile("runs/whole/stages/01-sft/metrics.jsonl") and damaged.read_text() == "{}"
    assert weights("runs/copy") == before and not Path("runs/copy/checkpoints/01-sft").exists()
    shutil.rmtree("runs/copy")


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def say(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(words)
        output, errors = capsys.readouterr()
        return int(caught.value.code or 0), output + errors

    assert "runs/whole: 15 of 15 stages done, seed 0" in say("runs")[1]
    assert runs_in(Path("runs/whole")).keys() == {"runs/whole"}
    assert "state: done" in say("show", "runs/whole")[1]
    assert json.loads(say("show", "runs/whole", "--json")[1])["ok"] is True
    code, error = say("show", "runs/nowhere")
    assert code == 6 and error.startswith(
        "whet: runs/nowhere: no run folder (it has no recipe.json); `whet runs` lists"
    )
    assert say("runs", "nowhere")[0] == 6 and say("diff", "runs/whole", "nowhere")[0] == 6
    assert "0 bytes can be freed" in say("gc", "runs/whole")[1]
