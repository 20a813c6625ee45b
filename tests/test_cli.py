"""The command line: it answers at once, says one line, and exits with a number that scripts can read."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from whet.cli.app import app, main
from whet.cli.errors import exit_codes, guarded, one_line
from whet.cli.tables import evaluation_table
from whet.errors import DataError, SamplerError, TrainingError, UserError

SOURCE = Path(__file__).resolve().parent.parent / "src"

RECIPE = """\
name: small
model: whet:tiny
stages:
  rl:
    kind: rl
    tasks: {generate: arithmetic}
    rewards: [{kind: verifier}]
    algorithm: dapo
    train: {steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return "r.yaml"


def whet(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def fails(error: BaseException):
    def command() -> int:
        raise error

    return command


def test_help_and_plan_import_nothing_heavy(recipe: str) -> None:
    """What each may not load: help no model of a recipe, plan no tensor."""
    code = (
        "import os, sys\n"
        "from whet.cli.app import main\n"
        "try: main(sys.argv[2:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = set(sys.argv[1].split(',')) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'GOMP_SPINCOUNT' in os.environ, 'OpenMP reads it when torch is loaded'\n"
    )
    never = "torch,transformers,datasets,peft,numpy,pyarrow,httpx"
    for heavy, words in ((f"{never},pydantic,yaml", ["--help"]), (never, ["plan", recipe]), (never, ["schema"])):
        command = [sys.executable, "-c", code, heavy, *words]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


COMMANDS = {
    each.name or each.callback.__name__: each.callback for each in app.registered_commands if each.callback is not None
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_short_help_and_a_result_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A new command without `--json`, or with one that it leaves unread, fails here."""
    assert whet(name, "--help") == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and len(shown.splitlines()) <= 40
    assert {"print_json", "_print"} & set(COMMANDS[name].__code__.co_names)


def test_a_user_error_is_one_line_and_its_exit_code(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("plan", recipe, "stages.rl.train.lrr=1") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "whet: command line: stages.rl.train.lrr: unknown key; did you mean 'lr'?\n"


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["rnu"], "whet: No such command 'rnu'; did you mean 'run'?"),
        (["train", "r.yaml"], "whet: No such command 'train'; whet run RECIPE"),
        (["plan"], "whet: Missing argument 'RECIPE'; see whet plan --help"),
        (["plan", "none.yaml"], "whet: none.yaml: no such recipe"),
        (["plan", "r.yaml", "fast"], "whet: command line: 'fast' is not KEY=VALUE"),
        (["plan", "r.yaml", "--fast"], "whet: command line: --fast: no such option"),
        (["chat", "run", "--fast"], "whet: No such option: --fast"),
    ],
)
@pytest.mark.usefixtures("recipe")
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    words: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whet(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(start)
    assert error.count("\n") == 1


@pytest.mark.parametrize(("words", "code"), [(["train.lrr=1"], 2), (["--fast"], 2)])
def test_with_json_the_last_line_on_stdout_is_the_error(
    recipe: str, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whet("plan", recipe, *words, "--json") == code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["ok"], last["exit_code"]) == (False, code)
    assert last["error"].startswith("command line: ")


def test_with_json_plan_is_one_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("plan", recipe, "--seed", "7", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["ok"] is True
    assert (result["recipe"]["seed"], result["origins"]["seed"]) == (7, "command line")
    assert result["stages"][0]["all_tokens"] == 32 * 8 * 256 * 10 * 10


def test_plan_shows_values_origins_and_arithmetic(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("plan", recipe, "seed=7") == 0
    output = capsys.readouterr().out
    for part in ("seed: 7  command line", "high: 0.28  preset dapo", "steps: 10  r.yaml:9", "65,536", "6,553,600"):
        assert part in output


def test_markup_in_a_recipe_is_shown_as_it_is(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("plan", recipe, "description='[bold red]x[/] \\\\e[31m'") == 0
    assert "[bold red]x[/]" in capsys.readouterr().out
    assert one_line("a\x1b[31m\nb") == "a\\x1b[31m\\nb"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("rows.jsonl:3: no answer"), 3, "whet: rows.jsonl:3: no answer"),
        (TrainingError("not finite"), 8, "whet: not finite"),
        (SamplerError("vLLM at http://x: refused"), 9, "whet: vLLM at http://x: refused"),
        (KeyboardInterrupt(), 130, "whet: interrupted"),
        (ZeroDivisionError("x"), 1, "whet: ZeroDivisionError: x (this is a bug in whet)"),
    ],
)
def test_every_exception_has_its_code_and_last_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(fails(error), as_json=True, show_traceback=False) == code
    output = capsys.readouterr()
    assert output.err.splitlines()[-1] == text
    assert json.loads(output.out)["exit_code"] == code
    assert ("Traceback" in output.err) == (code == 1)


def test_traceback_shows_where_a_user_error_arose(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("plan", recipe, "fast", "--traceback") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(recipe: str) -> None:
    command = f"{sys.executable} -m whet.cli plan {recipe} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        (">&-", 0, ""),
        ("> /dev/full", 6, "whet: standard output: No space left on device; make room, or write elsewhere\n"),
    ],
)
def test_a_standard_output_that_takes_nothing_is_no_bug(output: str, code: int, said: str) -> None:
    if "full" in output and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = f"{sys.executable} -m whet schema {output}"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_exit_codes_are_distinct_and_documented(capsys: pytest.CaptureFixture[str]) -> None:
    codes = [kind.exit_code for kind in (*UserError.__subclasses__(), SamplerError)]
    assert len(codes) == len(set(codes))
    assert whet("--help") == 0
    words = " ".join(capsys.readouterr().out.split())
    for code in (*codes, 130):
        assert f"{code} " in words
    assert "8 training cannot go on" in exit_codes()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("runs/dmo", "runs/dmo: no such directory, and not a hub id (org/name); did you mean 'runs/demo'?"),
        ("runs/dmo@rl", "did you mean 'runs/demo'?"),
        ("dmo", "did you mean 'runs/demo'?"),
        ("mine/dmo", "did you mean 'mine/demo'?"),
        ("hree", "did you mean 'here'?"),
        ("./modle", "did you mean 'model'?"),
        ("./dmo", "./dmo: no such directory"),
        ("a/b/c", "a/b/c: no such directory"),
    ],
)
def test_what_looks_like_a_run_or_a_path_is_never_looked_for_on_the_hub(
    what: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    for folder in ("runs/demo", "mine/demo", "here"):
        Path(folder).mkdir(parents=True)
        Path(folder, "recipe.json").write_text("{}")
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    assert whet("chat", what, "-p", "Hello") == 4
    assert expected in capsys.readouterr().err


def test_an_environment_is_shown_and_played_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shop.py").write_text(
        "import os\n\nclass Shop:\n"
        "    def reset(self, item: str): self.item = item\n\n"
        '    def find(self, name: str) -> str:\n        """Find."""\n        return f"{name} {self.item}"\n\n'
        '    def process(self) -> int:\n        """Show the process."""\n        return os.getpid()\n\n'
        "    def reward(self): return 1\n"
    )
    row = ("--row", "{item: cup}")
    assert whet("env", "shop.py:Shop", *row, "-t", 'find={"name": "a"}', "-t", 'find={"nam": 1}', "-t", "done") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("find(name)  Find.\nprocess()  Show the process.\n")
    assert "columns that reset takes: item" in shown and "a second process played the same" in shown
    assert "  assistant: find {'name': 'a'} [ok]\n  tool: a cup\n" in shown
    assert "find {'nam': 1} [bad_arguments]" in shown and "(worth {'reward': 1.0})" in shown
    assert whet("env", "shop.py:Shop", *row, "-t", "process={}", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["same"] is False
    for words, code, said in (
        (("shop.py:Shp",), 2, "did you mean 'Shop'?"),
        (("shop.py:Shop", "-t", "x"), 3, "reset needs the column 'item'"),
        (("shop.py:Shop", "--row", "[1]", "-t", "x"), 2, "--row [1]: is list; write an object"),
    ):
        assert whet("env", *words) == code
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("module", ["whet", "whet.cli"])
def test_it_runs_as_a_module(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["whet", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0 and "demo" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [100, 60, 24])
def test_an_evaluation_is_shown_whole_however_narrow_the_terminal(columns: int) -> None:
    """Every figure and every letter of a name: side by side where there is room, else a block for each model."""
    known = {"low": 0.37, "high": 0.47, "gain_low": -0.01, "gain_high": 0.11, "mean_length": 20.3}
    labels = ("base", "distilled_on_policy_from_32_layers")
    rows = [
        {**known, "label": label, "accuracy": 0.42, "gain": gain, "rewards": {"format": 0.5}, "of_k": {}}
        for label, gain in zip(labels, (None, 0.05), strict=True)
    ]
    said = io.StringIO()
    Console(file=said, width=columns).print(evaluation_table({"k": 1, "rows": rows}))
    lines, text = said.getvalue().splitlines(), "".join(said.getvalue().split())
    assert "…" not in text and max(map(len, lines)) <= columns
    assert all(text.count(figure) == 2 for figure in ("42.0%", "37.0%to47.0%", "20.3", "0.500"))
    assert text.count("+5.0") == text.count("-1.0to+11.0") == 1
    assert all(label in text for label in labels) or columns == 24
    assert text.count("accuracy") == (1 if columns == 100 else len(rows))
