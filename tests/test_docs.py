"""The documents are true: code runs, recipes load, commands parse, links lead somewhere, formulas are the code's own.

Blocks are known by the words after the fence: `python` is executed (all of a page in one namespace, in an empty
folder), `yaml` is a whole recipe, `yaml rl` the keys of such a stage, `bash` may hold whet commands, `formula NAME` is
the first line of NAME's docstring, `door NAME` the methods of a protocol or the signature of a function.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from safetensors import safe_open

from whet.cli.app import app
from whet.cli.errors import exit_codes
from whet.config import PRESETS, STAGES
from whet.config.loading import load_recipe
from whet.config.preference import PREFERENCE_PRESETS
from whet.envs.families import FAMILIES
from whet.launch.main import run_recipe
from whet.tracking.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
KINDS = {stage.kind_name() for stage in STAGES}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
METRIC_ROW = re.compile(r"^\| (`[^|]+`) \|", re.MULTILINE)

ENOUGH: dict[str, dict[str, Any]] = {
    "sft": {"data": {"generate": "arithmetic"}},
    "reward_model": {},
    "preference": {"data": {"generate": "arithmetic"}},
    "online_preference": {
        "tasks": {"generate": "arithmetic"},
        "rewards": [{"kind": "verifier"}],
        "train": {"steps": 1},
    },
    "rl": {"tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}], "train": {"steps": 1}},
    "eval": {"tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}]},
    "sample": {"tasks": {"generate": "arithmetic"}},
    "distill": {},
    "merge": {},
}
"""What a stage cannot do without, for blocks that show a part of one."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    kind: str
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        kind, *words = match[1].split() or [""]
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, kind, tuple(words), match[2]))
    return found


def every(kind: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.kind == kind]


def object_of(name: str) -> Any:
    """What a dotted name means: the longest part that is a module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such name")


# ------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.kind == "python" for b in blocks(page))], ids=lambda page: page.stem
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.kind == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("block", every("yaml"), ids=str)
def test_recipes_load(block: Block, tmp_path: Path) -> None:
    text = block.text
    if block.words:
        (kind,) = block.words
        stage = {"kind": kind, **ENOUGH[kind], **yaml.safe_load(text)}
        if "steps" in ENOUGH[kind].get("train", {}):
            stage["train"] = {**ENOUGH[kind]["train"], **stage["train"]}
        text = yaml.safe_dump({"name": "page", "model": "whet:tiny", "stages": {kind: stage}})
    (tmp_path / "recipe.yaml").write_text(text)
    load_recipe(tmp_path / "recipe.yaml")


COMMANDS = [
    pytest.param(line.partition("  #")[0].strip(), id=f"{block}: {line.strip()[:60]}")
    for block in every("bash")
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.startswith("whet ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and arguments are known, and a recipe that a command names takes the overrides beside it."""
    monkeypatch.chdir(ROOT)
    group = typer.main.get_command(app)
    words = [word for word in shlex.split(line)[1:] if not word.startswith((">", "|"))]
    context = group.make_context("whet", list(words), resilient_parsing=False)
    if not words or words[0].startswith("-"):
        return
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    given = command.make_context(words[0], words[1:], parent=context).params
    recipe = given.get("recipe")
    if recipe is not None and str(recipe).startswith("recipes/"):
        load_recipe(recipe, given["overrides"] or ())


# ------------------------------------------------------------------------------------- what must agree


@pytest.mark.parametrize("block", every("formula"), ids=lambda block: block.words[0])
def test_formulas_are_those_of_the_code(block: Block) -> None:
    (name,) = block.words
    assert block.text.strip() == inspect.getdoc(object_of(name)).splitlines()[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("block", every("door"), ids=lambda block: block.words[0])
def test_doors_have_the_signatures_of_the_code(block: Block) -> None:
    """One line a method, with the parameters' names in order; what is returned is for the reader."""
    (name,) = block.words
    parts = [line.partition("(") for line in block.text.strip().splitlines()]
    shown = {m.removeprefix("async "): re.findall(r"\w+", rest.partition(")")[0]) for m, _, rest in parts}
    assert shown == members(object_of(name))


def members(door: Any) -> dict[str, list[str]]:
    """Public methods and properties with their parameters; the fields of a record; or a function itself."""
    if not inspect.isclass(door):
        return {door.__name__: list(inspect.signature(door).parameters)}
    public = {name: value for name, value in vars(door).items() if not name.startswith("_")}
    if "__call__" in vars(door):
        public[door.__name__] = vars(door)["__call__"]
    methods = {name: value for name, value in public.items() if callable(value) or isinstance(value, property)}
    return {name: parameters(value) for name, value in methods.items()} or {n: [] for n in door.__dataclass_fields__}


def parameters(member: Any) -> list[str]:
    """Names of what a method takes; a property takes nothing."""
    return [name for name in inspect.signature(member).parameters if name != "self"] if callable(member) else []


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", page.read_text())):
            if target.startswith(("http://", "https://", "#")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve()
            assert file.exists(), f"{page.relative_to(ROOT)}: {target}"
            if anchor:
                assert anchor in anchors(file), f"{page.relative_to(ROOT)}: {target}"


def test_tests_that_a_page_names_exist() -> None:
    for page in PAGES:
        for line in page.read_text().splitlines():
            files = re.findall(r"tests/[\w/]+\.py", line)
            source = "".join((ROOT / file).read_text() for file in files)
            wanted = re.findall(r"::(\w+)", line) + re.findall(r"\w{3,}", "".join(re.findall(r" -k (.+)", line)))
            for name in wanted if files else ():
                assert re.search(rf"def test_\w*{name.removeprefix('test_')}", source), f"{page.name}: no test {name}"


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_map() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(page.read_text())}
        waiting += [target for target in targets - reached if target.suffix == ".md" and target not in waiting]
    lost = [str(page.relative_to(ROOT)) for page in PAGES if "docs" in page.parts and page not in reached]
    assert not lost, "docs/index.md leads to every page"


def test_every_algorithm_is_described() -> None:
    """By a page of its name, or a heading with its name on a page about several."""
    pages = list((ROOT / "docs" / "algorithms").glob("*.md"))
    headings = [line for page in pages for line in page.read_text().splitlines() if line.startswith("#")]
    for name in ("sft", *PRESETS, *PREFERENCE_PRESETS):
        described = any(page.stem == name for page in pages) or any(f"`{name}`" in heading for heading in headings)
        assert described, f"docs/algorithms says nothing of {name}"


def test_every_stage_kind_is_named() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"`{kind}`" in page for kind in KINDS)


def test_every_command_and_exit_code_has_a_line() -> None:
    page, readme = (ROOT / "docs" / "cli.md").read_text(), (ROOT / "README.md").read_text()
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`whet {name}" in page, name
    for entry in re.split(r"; (?=\d+ )", exit_codes()):
        code, _, meaning = entry.partition(" ")
        assert f"| {code} | {meaning}" in page and f"\n| {code} | " in readme, entry


# ------------------------------------------------------------------------------------------------ metrics

TINY = """\
name: tiny
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
stages:
  sft:
    kind: sft
    data: {generate: arithmetic, count: 8}
    eval_data: {generate: arithmetic, count: 8, split: test}
    train: {steps: 1, batch_size: 4}
  dpo:
    kind: preference
    data: {generate: arithmetic, count: 8, answers: 3}
    eval_data: {generate: arithmetic, count: 8, split: test}
    loss: rpo
    train: {steps: 1, batch_size: 4}
  kto:
    kind: preference
    data: {generate: arithmetic, count: 8}
    loss: kto
    train: {steps: 1, batch_size: 4}
  label:
    kind: compare
    model: whet:demo
    tasks: {generate: arithmetic, count: 4, digits: 1}
    judge: {model: {script: "whet.envs.judges.rules:longer"}, visible: everything}
    sampling: {max_tokens: 24}
  revise:
    kind: revise
    model: whet:demo
    tasks: {generate: arithmetic, count: 2, digits: 1}
    principles: [Show your work.]
    writer: {script: "whet.envs.judges.rules:tutor"}
    visible: everything
    max_tokens: 40
  ask:
    kind: questions
    data: {generate: arithmetic, count: 2}
    wording: {visible: everything, reasoning: true}
    teacher: {script: "whet.envs.judges.rules:longer"}
  agreement:
    kind: agreement
    data: {generate: arithmetic, count: 2}
    judge: {model: {script: "whet.envs.judges.rules:longer"}, visible: everything}
  steps:
    kind: step_labels
    model: whet:demo
    tasks: {generate: arithmetic, count: 2, digits: 1}
    rewards: [{kind: verifier}]
    samples: 2
    rollouts: 2
    separator: ";"
    sampling: {max_tokens: 24}
  sample:
    kind: sample
    model: whet:demo
    tasks: {generate: arithmetic, count: 4, digits: 1}
    rewards: [{kind: verifier}]
    sampling: {max_tokens: 24}
  select:
    kind: select
    data: "@sample"
    best: 1
  rm:
    kind: reward_model
    data: {path: "@label"}
    eval_data: {path: "@label"}
    train: {steps: 1, batch_size: 2}
  online:
    kind: online_preference
    tasks: {generate: arithmetic}
    rewards: [{kind: verifier}, {kind: overlong, cache_tokens: 4}]
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {max_tokens: 8}
    train: {steps: 1}
  distill:
    kind: distill
    teacher: "@sft"
    data: {generate: arithmetic, count: 8}
    eval_data: {generate: arithmetic, count: 8, split: test}
    tasks: {generate: arithmetic}
    top_k: 4
    prompts_per_step: 2
    sampling: {max_tokens: 8}
    train: {steps: 4, batch_size: 4}
  merge: {kind: merge, inputs: ["@sft", "@distill"]}
  on_policy:
    kind: rl
    tasks: {generate: arithmetic}
    rewards: [{kind: verifier}]
    algorithm: {credit: teacher, teacher: "@sft", baseline: none, scale: none}
    prompts_per_step: 2
    rollouts_per_prompt: 1
    sampling: {max_tokens: 8}
    train: {steps: 1}
  rl:
    kind: rl
    tasks: {generate: arithmetic}
    rewards:
      - {kind: verifier}
      - {kind: format}
      - {kind: judge, name: points, model: &longer {script: "whet.envs.judges.rules:longer"}, visible: everything}
      - {kind: judge, name: pairs, model: *longer, visible: everything, form: pairs}
    algorithm: {preset: grpo, minibatches: 2}
    prompts_per_step: 2
    rollouts_per_prompt: 2
    sampling: {max_tokens: 8}
    train: {steps: 1}
"""


def documented() -> list[re.Pattern[str]]:
    """The first column of every table in docs/metrics.md; a word in capitals stands for any name."""
    names = re.findall(r"`([^`]+)`", " ".join(METRIC_ROW.findall((ROOT / "docs" / "metrics.md").read_text())))
    return [re.compile(re.sub(r"\b[A-Z]+\b", r"[^/]+(?:/[^/]+)*", re.escape(name))) for name in names]


def test_every_metric_is_explained(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    loaded = load_recipe(tmp_path / "tiny.yaml", [f"out={tmp_path / 'run'}"])
    without = {"eval"}  # leaves a table, no line a step
    assert {stage.kind for stage in loaded.recipe.stages.values()} == KINDS - without
    run_recipe(loaded, quiet=True)
    known = documented()
    for folder in sorted((tmp_path / "run" / "stages").iterdir()):
        for line in read_metrics(folder):
            for name in line:
                assert any(pattern.fullmatch(name) for pattern in known), f"docs/metrics.md says nothing of {name}"


def test_the_counts_in_the_readme_are_true() -> None:
    text = README
    with safe_open(ROOT / "src" / "whet" / "assets" / "demo" / "model.safetensors", "np") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert f"A model of {parameters:,} parameters" in text
    assert f"| {len(PRESETS)} presets (" in text
    others = [name for name in PREFERENCE_PRESETS if name not in ("dpo", "kto")]
    assert f"| DPO and {len(others)} other losses, KTO" in text
    words = {2: "two", 3: "three", 4: "four", 5: "five"}
    assert f"{words[len(FAMILIES)]} task families that make their own problems" in text
    recipes = [file.name for file in (ROOT / "recipes").glob("*.yaml")]
    assert not [name for name in recipes if not any(f"recipes/{name}" in page.read_text() for page in PAGES)]


def test_the_laws_that_the_readme_names_are_there() -> None:
    lines = re.findall(r"^python -m pytest (\S+(?: tests\S+)*)(?: -k (?:\"(.+)\"|(\S+)))?$", README, re.MULTILINE)
    assert len(lines) == 4
    for files, several, one in lines:
        names = re.findall(r"def (test_\w+)", "".join((ROOT / file).read_text() for file in files.split()))
        for word in (several or one).split(" or "):
            assert any(word in name for name in names), word
