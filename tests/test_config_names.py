"""Names that are no keys: former ones and those of other tools are answered with the key that is meant."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from whet.config.loading import load_recipe
from whet.config.names import names
from whet.config.places import has_key, models_of
from whet.config.preference import PREFERENCE_PRESETS
from whet.config.presets import PRESETS
from whet.config.recipe import STAGES, Recipe
from whet.errors import ConfigError

NAMES = names()
PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
STAGE = {
    "sft": {"kind": "sft", "data": {"generate": "arithmetic"}},
    "preference": {"kind": "preference", "data": {"generate": "arithmetic"}},
    "rl": {
        "kind": "rl",
        "tasks": {"generate": "arithmetic"},
        "rewards": [{"kind": "verifier"}],
        "train": {"steps": 1},
    },
}


def complaint(folder: Path, *words: str, **sections: object) -> str:
    """What is wrong with a recipe of these sections; empty where nothing is."""
    recipe = {"name": "r", "model": "whet:demo", **sections}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    try:
        load_recipe(folder / "r.yaml", words)
    except ConfigError as error:
        return str(error)
    return ""


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """A section and all below it."""
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        parts = re.findall(r"whet\.[\w.]+", str(field.annotation))
        inner = models_of(field.annotation) if not parts else [*models_of(field.annotation), *_listed(field.annotation)]
        for each in inner:
            yield from sections(each, seen)


def _listed(annotation: object) -> list[type[BaseModel]]:
    """The sections of lists and of tagged unions in them."""
    found: list[type[BaseModel]] = []
    for part in getattr(annotation, "__args__", ()):
        found += [*models_of(part), *_listed(part)]
    return found


def every_section() -> list[type[BaseModel]]:
    seen: set[type[BaseModel]] = set()
    return [section for stage in (Recipe, *STAGES) for section in sections(stage, seen)]


def is_key(key: str) -> bool:
    """Whether it is one of a stage or of the recipe."""
    return any(has_key(model, key.split(".")) for model in (*STAGES, Recipe))


# --------------------------------------------------------------------------------------- former keys


@pytest.mark.parametrize("old", NAMES.renamed)
def test_a_renamed_key_exists_under_its_new_name_and_not_under_its_old_one(old: str) -> None:
    for new in NAMES.renamed[old]:
        having = [section for section in every_section() if new in section.model_fields]
        assert having
        assert not [section for section in having if old in section.model_fields]


@pytest.mark.parametrize(
    ("stage", "keys", "expected"),
    [
        ("rl", {"algorithm": {"aggregate": "token_mean"}}, "aggregate is now called 'reduction'"),
        ("rl", {"algorithm": {"kl": {"keep": 0.9}}}, "kl.keep: unknown key; keep is now called 'ema_decay'"),
        ("rl", {"algorithm": {"positives": {}}}, "positives is now called 'positive_nll'"),
        ("rl", {"curriculum": {"by": "solved"}}, "by is now called 'order_by'"),
        ("rl", {"rewards": [{"kind": "judge", "by": {"path": "x"}}]}, "by is now called 'model'"),
        ("sft", {"data": {"generate": "arithmetic", "wishes": True}}, "wishes is now called 'style_instructions'"),
    ],
)  # fmt: skip
def test_a_former_key_is_answered_with_its_new_name(stage: str, keys: dict, expected: str, tmp_path: Path) -> None:
    assert expected in complaint(tmp_path, stages={"s": STAGE[stage] | keys})


# -------------------------------------------------------------------------------- names of other tools


@pytest.mark.parametrize("name", NAMES.other_tools)
def test_a_name_of_another_tool_leads_to_a_key_that_there_is(name: str) -> None:
    known = NAMES.other_tools[name]
    assert known.keys or known.note
    assert all(map(is_key, known.keys))
    told = re.findall(r"\b(?:train|tasks|algorithm)\.[\w.]+\b", known.note)
    assert all(map(is_key, told))


@pytest.mark.parametrize("stage", STAGE)
@pytest.mark.parametrize("name", [name for name in NAMES.other_tools if "." not in name])
def test_it_is_answered_wherever_it_is_written(name: str, stage: str, tmp_path: Path) -> None:
    """At the top, in the stage, in its `train` and as an option: the same key, as that place would write it."""
    known, own = NAMES.other_tools[name], STAGE[stage]
    last = [key.rpartition(".")[2] for key in known.keys]
    found = [
        complaint(tmp_path, stages={"s": own}, **{name: 1}),
        complaint(tmp_path, stages={"s": {**own, name: 1}}),
        complaint(tmp_path, stages={"s": {**own, "train": {**own.get("train", {}), name: 1}}}),
        complaint(tmp_path, f"--{name.replace('_', '-')}", "1", stages={"s": own}),
        complaint(tmp_path, f"--{name}", stages={"s": own}),
    ]
    for text in found:
        assert "\n" not in text
        assert re.search(rf"{name.replace('_', '[_-]')}: unknown key; ", text)
        assert re.search(rf"is '([\w-]+\.)*({'|'.join(last)})'", text) if last else known.note in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning_rate", "1e-5"], "command line: learning_rate: unknown key; learning_rate is 'train.lr' here"),
        (["--packing", "--bf16"], "bf16: unknown key; bf16 is 'model.dtype' here"),
        (["actor_rollout_ref.rollout.n=5"], "actor_rollout_ref.rollout.n is 'stages.s.rollouts_per_prompt' here"),
        (["trainer.total_epochs=5"], "trainer: unknown key; total_epochs is 'train.epochs' here"),
        (["actor_rollout_ref.actor.optim.weight_decay=0.1"], "weight_decay is 'train.weight_decay' here"),
        (["actor_rollout_ref.rollout.top_k=-1"], "unknown key; did you mean 'sampling.top_k'?"),
        (["stages.s.seed=1"], "stages.s.seed: unknown key; did you mean 'seed'?"),
        (["algorithm.filter_groups.enable=true"], "filter_groups is 'stages.s.algorithm.dynamic_sampling' here"),
        (["reward_model.overlong_buffer.len=4096"], "overlong_buffer is 'stages.s.rewards' here: [{kind: overlong"),
        (["beta=0.04"], "beta is 'stages.s.algorithm.kl.coefficient' here"),
        (["stages.s.max_tokens=5"], "unknown key; did you mean 'sampling.max_tokens'?"),
        (["stages.s.train.rollouts_per_prompt=5"], "unknown key; did you mean 'stages.s.rollouts_per_prompt'?"),
        (["stages.s.data=x.jsonl"], "command line: stages.s.data: unknown key; did you mean 'tasks'?"),
        (["lr=1"], "command line: lr: unknown key; did you mean 'train.lr'?"),
        (["tasks=x.jsonl"], "command line: tasks: unknown key; did you mean 'stages.s.tasks'?"),
    ],
)
def test_an_option_of_another_tool_or_a_key_in_the_wrong_place(words: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in complaint(tmp_path, *words, stages={"s": STAGE["rl"]})


def test_a_key_that_is_missing_says_what_it_is_for(tmp_path: Path) -> None:
    stage = {key: value for key, value in STAGE["rl"].items() if key != "tasks"}
    assert "tasks: missing; Rows from a file, a folder or the hub" in complaint(tmp_path, stages={"s": stage})
    assert said({"name": "r", "stages": {"s": STAGE["sft"]}}).startswith("Python: model: missing; Which weights")


def test_several_are_named_at_once(tmp_path: Path) -> None:
    keys = {"learning_rate": 1, "packing": True, "bf16": True, "num_train_epochs": 1}
    text = complaint(tmp_path, stages={"s": STAGE["sft"]}, **keys)
    assert text.endswith("bfloat16; auto is that on a GPU (and 3 more problems; unknown too: learning_rate, "
                         "num_train_epochs, packing)")  # fmt: skip


@pytest.mark.parametrize("method", [*PRESETS, *PREFERENCE_PRESETS])
def test_a_method_in_the_place_of_a_kind_is_answered_with_keys_that_load(method: str, tmp_path: Path) -> None:
    text = complaint(tmp_path, stages={"s": {"kind": method}})
    found = re.search(r"; write kind: (\w+), (\w+): (\w+)", text)
    assert found is not None
    kind, key, preset = found.groups()
    assert preset == method
    own = {**STAGE[kind], key: preset}
    if kind == "rl":
        own |= {"prompts_per_step": 32, "rewards": [{"kind": "verifier"}, {"kind": "format"}, {"kind": "steps"}]}
        own |= {"environment": "shop.py:Shop"}
    if method == "spo_tree":
        assert "give both (branches: [4, 2])" in complaint(tmp_path, stages={"s": own})
        own |= {"branches": [4, 2], "rollouts_per_prompt": 8}
    assert complaint(tmp_path, stages={"s": own}) == ""


@pytest.mark.parametrize("name", NAMES.other_kinds)
def test_a_kind_by_another_name(name: str, tmp_path: Path) -> None:
    kinds = [stage.kind_name() for stage in STAGES]
    text = complaint(tmp_path, stages={"s": {"kind": name}})
    assert text.endswith(f"write kind: {NAMES.other_kinds[name]}")
    assert NAMES.other_kinds[name].partition(",")[0] in kinds
    assert name not in kinds


@pytest.mark.parametrize(
    ("data", "words", "paths"),
    [
        ("good.jsonl", [], ["good.jsonl"]),
        (["a.jsonl", {"path": "b.jsonl"}], [], ["a.jsonl", "b.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["stages.s.data.1=c.jsonl"], ["a.jsonl", "c.jsonl"]),
        ({"generate": "arithmetic", "count": 9}, ["stages.s.data=d.jsonl"], ["d.jsonl"]),
    ],
)
def test_rows_may_be_named_by_their_path_alone(
    data: object, words: Sequence[str], paths: list[str], tmp_path: Path
) -> None:
    text = yaml.safe_dump({"name": "r", "model": "whet:demo", "stages": {"s": {"kind": "sft", "data": data}}})
    (tmp_path / "r.yaml").write_text(text)
    loaded = load_recipe(tmp_path / "r.yaml", words)
    found = loaded.recipe.stages["s"].data  # type: ignore[attr-defined]
    assert [each.path for each in (found if isinstance(found, list) else [found])] == paths


def test_a_path_alone_keeps_the_other_keys_of_rows(tmp_path: Path) -> None:
    stage = {"kind": "sft", "data": {"path": "a.jsonl", "on_bad_row": "drop"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "whet:demo", "stages": {"s": stage}}))
    loaded = load_recipe(tmp_path / "r.yaml", ["stages.s.data=b.jsonl"])
    assert loaded.recipe.stages["s"].data.model_dump(include={"path", "on_bad_row"}) == {  # type: ignore[attr-defined]
        "path": "b.jsonl",
        "on_bad_row": "drop",
    }
    assert str(loaded.origins["stages.s.data.path"]) == "command line"


# -------------------------------------------------------------------------------- typos and mutations

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
FREE = ("stages", "models", "columns", "options", "args", "objectives")
"""Sections whose keys are names that the recipe gives."""


def read(file: Path) -> Any:
    """A recipe's tree, by libyaml where it is there: ten times as fast."""
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506


def walk(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every key and entry."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        yield (*path, key)
        yield from walk(child, (*path, key))


def at(value: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value


def said(recipe: Mapping[str, Any]) -> str:
    """What is wrong with it; empty where nothing is. Whatever else is raised is a bug."""
    try:
        load_recipe(recipe)
    except ConfigError as error:
        return str(error)
    return ""


def places_of_keys() -> list[tuple[Path, tuple[str | int, ...]]]:
    """Each key once for each section that it stands in, somewhere in the recipes."""
    found: dict[tuple[str, ...], tuple[Path, tuple[str | int, ...]]] = {}
    for file in RECIPES:
        tree = read(file)
        for path in walk(tree):
            if isinstance(path[-1], str) and len(path[-1]) > 3 and path[-2:-1] not in [(name,) for name in FREE]:
                section = at(tree, path[:-1])
                kind = str(section.get("kind", "")) if len(path) > 1 else ""
                found.setdefault((*map(str, path[-2:]), kind), (file, path))
    return list(found.values())


@pytest.mark.parametrize("place", places_of_keys(), ids=lambda place: ".".join(map(str, place[1])))
def test_a_letter_left_out_of_a_key_is_answered_with_that_key(place: tuple[Path, tuple[str | int, ...]]) -> None:
    file, path = place
    tree = read(file)
    key, section = str(path[-1]), at(tree, path[:-1])
    typo = key[: len(key) // 2] + key[len(key) // 2 + 1 :]
    entries = {typo if name == key else name: value for name, value in section.items()}
    section.clear()
    section.update(entries)
    text = said(tree)
    assert f"{typo}: unknown key; did you mean {key!r}?" in text or text.endswith(f"there are {typo}, stages"), text


WRONG = [
    None,
    [],
    {},
    [[]],
    [1, [2, {"a": 3}]],
    -1,
    1e30,
    True,
    "",
    "a b",
    "x.py:f",
    "@sft",
    "\x1b[31m",
    "a\nb",
    10**40,
]
WRONG += [{"kind": each} for each in (None, [], {}, "x", 1)] + [{"path": None}, {"path": []}, {1: 2}, [None], ["x"]]


@pytest.mark.parametrize("seed", range(200))
def test_a_mutated_recipe_is_one_line_or_loads(seed: int) -> None:
    draw = random.Random(seed)
    tree = read(draw.choice(RECIPES))
    for _ in range(draw.choice([1, 1, 2, 3])):
        path = draw.choice(list(walk(tree)) or [()])
        if not path:
            break
        section, key, value = at(tree, path[:-1]), path[-1], at(tree, path)
        match draw.choice(["drop", "wrong", "wrong", "wrong", "wrap", "more"]):
            case "drop":
                del section[key]
            case "wrong":
                section[key] = draw.choice(WRONG)
            case "wrap":
                section[key] = draw.choice([[value], {"a": value}, [[value]], str(value), {"kind": value}])
            case "more" if isinstance(section, dict):
                section[draw.choice(["lr", "path", "kind", "rewards", "train", ""])] = draw.choice(WRONG)
    assert re.fullmatch(r"Python: .+|", said(tree))


# -------------------------------------------------------------------------------- code of one's own


@pytest.mark.parametrize(
    ("stage", "wrong", "hint", "right"),
    [
        ("rl", {"algorithm": {"loss": "own.py:policy"}}, "write clip: {path: own.py:policy}",
         {"algorithm": {"clip": {"path": "own.py:policy"}}}),
        ("rl", {"algorithm": {"clip": "own.py:policy"}}, "write {path: own.py:policy}",
         {"algorithm": {"clip": {"path": "own.py:policy"}}}),
        ("rl", {"algorithm": "own.py:policy"}, "write algorithm.clip: {path: own.py:policy}",
         {"algorithm": {"clip": {"path": "own.py:policy"}}}),
        ("rl", {"loss_type": "own.py:policy"}, "write algorithm.clip: {path: own.py:policy}",
         {"algorithm": {"clip": {"path": "own.py:policy"}}}),
        ("preference", {"loss": "own.py:pairs"}, "write loss.function: {path: own.py:pairs}",
         {"loss": {"function": {"path": "own.py:pairs"}}}),
        ("rl", {"reward_funcs": "own.py:reward"}, "write rewards: [{kind: function, path: own.py:reward}]",
         {"rewards": [{"kind": "function", "path": "own.py:reward"}]}),
        ("rl", {"rewards": "own.py:reward"}, "write rewards: [{kind: function, path: own.py:reward}]",
         {"rewards": [{"kind": "function", "path": "own.py:reward"}]}),
        ("rl", {"rewards": ["own.py:reward"]}, "write {kind: function, path: own.py:reward}",
         {"rewards": [{"kind": "function", "path": "own.py:reward"}]}),
        ("rl", {"rewards": [{"path": "own.py:reward"}]}, "rewards.0.kind: missing; write kind: function",
         {"rewards": [{"kind": "function", "path": "own.py:reward"}]}),
        ("rl", {"rewards": [{"kind": "function", "file": "own.py:reward"}]}, "write path: own.py:reward",
         {"rewards": [{"kind": "function", "path": "own.py:reward"}]}),
        ("rl", {"environment_factory": "own.py:Shop"}, "write environment: {path: own.py:Shop}",
         {"environment": {"path": "own.py:Shop"}}),
        ("rl", {"tools": "own.py:add"}, "write environment.tools: [{path: own.py:add}]",
         {"environment": {"tools": [{"path": "own.py:add"}]}}),
        ("rl", {"rewards": [{"kind": "judge", "model": "own.py:wins"}]}, "write {script: own.py:wins}",
         {"rewards": [{"kind": "judge", "model": {"script": "own.py:wins"}}]}),
        ("sft", {"compute_loss_func": "own.py:policy"}, "it is algorithm.clip of kind rl or loss.function of kind pref",
         {}),
        ("sft", {"compute_metrics": "own.py:reward"}, "write evaluation.rewards: [{kind: function, path: own.py:rewar",
         {"evaluation": {"tasks": "t.jsonl", "rewards": [{"kind": "function", "path": "own.py:reward"}]}}),
    ],
)  # fmt: skip
def test_code_of_ones_own_under_another_key_is_answered_with_a_form_that_loads(
    stage: str, wrong: dict, hint: str, right: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def policy(tokens):\n    return tokens.logp\n\n\npairs = policy\n")
    text = complaint(tmp_path, stages={"s": STAGE[stage] | wrong})
    assert hint in text and text.count(";") == 1, text
    assert complaint(tmp_path, stages={"s": STAGE[stage] | right}) == ""


# ------------------------------------------------------------------------------------------- the page


def rows() -> Iterator[tuple[list[str], list[str]]]:
    """The keys and the names of each line of the page's tables of names."""
    for line in PAGE.read_text().splitlines():
        cells = line.strip("|").split("|")
        if line.startswith("| ") and len(cells) == 5 and cells[0].strip() != "here":
            ours, *others = [re.findall(r"`([^`]+)`", cell) for cell in cells]
            yield ours, [name for cell in others for name in cell]


def test_the_page_has_every_name_with_its_key() -> None:
    listed: dict[str, set[str]] = {}
    for ours, others in rows():
        assert all(map(is_key, ours))
        for name in others:
            listed.setdefault(name, set()).update(ours)
    same = {name for name, ours in listed.items() if any(key.rpartition(".")[2] == name for key in ours)}
    assert listed.keys() - (same - NAMES.other_tools.keys()) == NAMES.other_tools.keys()
    for name, known in NAMES.other_tools.items():
        assert (listed[name] & set(known.keys)) or not (listed[name] or known.keys), name
