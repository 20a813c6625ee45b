"""From a file and a command line to a recipe, and from where each of its values came.

The order of precedence, weakest first: the defaults of `recipe.py`, a preset, the recipe's top-level `train` and
`sampling` (which every stage with such a section inherits key by key), the stage's own keys, and what was typed
after the recipe's name. Nothing else is read: no environment variable, no file that the recipe does not name.

Relative paths in a recipe mean what they would mean if typed: they start at the current folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from whet.config.loops import write_out
from whet.config.names import names
from whet.config.node import COMMAND_LINE, Key, KeyPath, Node, dotted, parse, written
from whet.config.problems import explain, nearest
from whet.config.recipe import INHERITED, SHORT, STAGES, Recipe, recipe_of
from whet.config.stage import StageBase
from whet.config.strict import children
from whet.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueOrigin:
    """Who gave a value."""

    kind: Literal["default", "preset", "file", "command line"]
    text: str
    """As shown: `default`, `preset dapo`, `recipes/x.yaml:12`, `command line`."""

    def __str__(self) -> str:
        return self.text


Stages = Sequence[type[StageBase]]
DEFAULT = ValueOrigin(kind="default", text="default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A recipe, and the origin of every value in it by dotted path (`stages.rl.train.lr`)."""

    recipe: Recipe
    origins: Mapping[str, ValueOrigin]


def load_recipe(path: Path | str | Mapping[str, Any], overrides: Sequence[str] = (), stages: Stages = STAGES) -> Loaded:
    """Read a recipe (a file, or the same as a mapping) whose stages are of these kinds, and put the overrides over it.

    An override is `train.lr=2e-5`, `--train.lr=2e-5` or `--train.lr 2e-5` (two words); its value is read as YAML. A
    word that is a YAML file has a `machine` section, which goes over the recipe's and under what was typed.

    Raises:
        ConfigError: one line with file and line (or `command line`), key and remedy.

    """
    file = root = _expand(written(path)) if isinstance(path, Mapping) else _read(Path(path))
    for key_path, text in sorted(split_overrides(overrides), key=lambda pair: pair[0] != ()):
        root = _override(root, key_path, _value(text, key_path)) if key_path else _on_machine(root, Path(text))
    makes = {kind.kind_name(): kind.makes for kind in stages}
    root = write_out(root, makes)
    _check_inherited(write_out(file, makes), root, stages)
    root = _inherit(root, stages)
    model = recipe_of(tuple(stages))
    try:
        recipe = model.model_validate(root.plain())
    except ValidationError as error:
        raise explain(error, root, model) from error
    return Loaded(recipe=recipe, origins=_origins(recipe, root))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every value of the recipe, defaults included, as JSON has them."""
    return recipe.model_dump(mode="json")


def split_overrides(words: Sequence[str]) -> list[tuple[KeyPath, str]]:
    """Key paths and the text of their values, in the order given; a file of a machine has the path ().

    Raises:
        ConfigError: a word is neither `KEY=VALUE` nor an option with a value.

    """
    pairs: list[tuple[KeyPath, str]] = []
    rest = deque(words)
    while rest:
        word = rest.popleft()
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--"):
            if names().known(key) and (not rest or rest[0].startswith("--")):  # a flag there: --bf16
                value = "true"
            elif not rest:
                raise ConfigError(f"{COMMAND_LINE}: {word}: no such option, and no value for a key of that name")
            else:
                value = rest.popleft()
        elif not equals and word.endswith((".yaml", ".yml")):
            pairs.append(((), word))
            continue
        elif not equals:
            raise ConfigError(f"{COMMAND_LINE}: {word!r} is not KEY=VALUE; write for example train.lr=2e-5")
        parts = key.split(".")
        if not all(parts):
            raise ConfigError(f"{COMMAND_LINE}: {word!r}: a key is names with dots between, such as train.lr")
        pairs.append((tuple(parts), value))
    return pairs


def _read(path: Path) -> Node:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent
        others = sorted(str(folder / each.name) for each in folder.glob("*.yaml") if each.is_file())
        raise ConfigError(f"{path}: no such recipe{nearest(str(path), others)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: a folder, and no recipe; give a .yaml file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    root = parse(text, str(path))
    if not isinstance(root.value, dict):
        raise ConfigError(f"{root.place}: a recipe is a section of keys (name, model, stages)")
    return _expand(root)


def _on_machine(root: Node, path: Path) -> Node:
    """The tree with the machine of a second file, which has nothing else."""
    given = _read(path).section
    for key, node in given.items():
        if key != "machine":
            alone = "a second file has the section 'machine' alone; put the rest into the recipe"
            raise ConfigError(f"{node.place}: {key}: {alone}")
    if "machine" not in given:
        raise ConfigError(f"{path}: a second file has the section 'machine', and this one is empty")
    return root.with_child("machine", given["machine"].over(root.child("machine")))


# ------------------------------------------------------------------------------------------- short forms


def _long_form(path: KeyPath) -> str | None:
    """The key that plain text at this path stands for: `model: PATH` is `model: {path: PATH}`."""
    if path == ("model",):
        return SHORT["model"]
    path = _in_group(path)
    entry = len(path) == 4 and str(path[3]).isdecimal() and SHORT.get(str(path[2])) == "path"
    return SHORT.get(str(path[2])) if path[:1] == ("stages",) and (len(path) == 3 or entry) else None


def _in_group(path: KeyPath) -> KeyPath:
    """The path as if its stage stood in no loop: `stages.improve.stages.sft` is `stages.sft`."""
    return path[2:] if path[:1] == ("stages",) and path[2:3] == ("stages",) else path


def _expand(node: Node) -> Node:
    """The tree with every short form written out; each value keeps the place of its short form."""
    key, depth = _long_form(node.path), len(_in_group(node.path))
    if key is not None and isinstance(node.value, str):
        return replace(node, value={key: node})
    if isinstance(node.value, list) and depth == 3:
        return replace(node, value=[_expand(child) for child in node.value])
    if isinstance(node.value, dict) and depth < 3:
        return replace(node, value={name: _expand(child) for name, child in node.value.items()})
    return node


# --------------------------------------------------------------------------------------------- overrides


def _value(text: str, path: KeyPath) -> Node:
    """The text of an override as YAML, but for `@stage`, which YAML would want in quotes."""
    if text.startswith("@"):
        return Node(value=text, source=COMMAND_LINE, line=0, path=path)
    return parse(text, COMMAND_LINE, path)


def _override(root: Node, path: KeyPath, value: Node) -> Node:
    """The tree with the value at this path; `model=PATH` keeps the other keys of `model`, but no `generate`."""
    key, there = _long_form(path), root.find(path)
    if key is not None and isinstance(value.value, str):
        generated = there is not None and "generate" in there.section
        path, value = (path, replace(value, value={key: value})) if generated else ((*path, key), value)
    for group, name in ((path[:1], path[1:2]), (path[:3], path[3:4])):
        stages = root.find(group) if group[-1] == "stages" and name else None
        if stages is not None and stages.child(name[0]) is None:
            near = nearest(str(name[0]), list(stages.section))
            raise ConfigError(f"{COMMAND_LINE}: {dotted((*group, *name))}: no such stage{near}")
    return _put(root, path, value, ())


def _put(node: Node, path: KeyPath, value: Node, done: KeyPath) -> Node:
    if not path:
        return value
    key: Key = path[0]
    here = dotted((*done, key))
    if isinstance(node.value, list):
        if not str(key).isdecimal() or int(key) >= len(node.value):
            raise ConfigError(f"{COMMAND_LINE}: {here}: {dotted(done)} has entries 0 to {len(node.value) - 1}")
        key = int(key)
    elif node.value is not None and not isinstance(node.value, dict):
        raise ConfigError(f"{COMMAND_LINE}: {here}: {dotted(done)} is {node.value!r}, which has no keys")
    empty = Node(value={}, source=COMMAND_LINE, line=0, path=(*done, key))
    return node.with_child(key, _put(node.child(key) or empty, path[1:], value, (*done, key)))


# ------------------------------------------------------------------------------------------- inheritance


def _stages_with(root: Node, section: str, kinds: Stages) -> dict[str, Node]:
    """The stages whose kind has this section."""
    stages = root.section.get("stages")
    named = stages.section if stages is not None else {}
    return {name: stage for name, stage in named.items() if section in _fields(stage, kinds)}


def _fields(stage: Node, kinds: Stages) -> Mapping[str, object]:
    kind = stage.child("kind")
    return next((model.model_fields for model in kinds if kind is not None and kind.value == model.kind_name()), {})


def _inherit(root: Node, kinds: Stages) -> Node:
    """Each stage with its own keys over those of the recipe's `train` and `sampling`, which are then gone."""
    for section in INHERITED:
        base = root.section.get(section)
        if base is None:
            continue
        for name, stage in _stages_with(root, section, kinds).items():
            own = stage.section.get(section)
            merged = own.over(base) if own is not None else base
            stages = root.section["stages"].with_child(name, stage.with_child(section, merged))
            root = root.with_child("stages", stages)
    return replace(root, value={key: child for key, child in root.section.items() if key not in INHERITED})


def _check_inherited(file: Node, root: Node, kinds: Stages) -> None:
    """Refuse a default that reaches no stage: it would be changed, in the file or by hand, without effect.

    A key of the file is compared with the file's stages; one of the command line with all that was given.
    """
    for section in INHERITED:
        for tree, typed in ((file, False), (root, True)):
            base = tree.child(section)
            stages = _stages_with(tree, section, kinds)
            if base is None or not _kinds_known(tree, kinds):
                continue
            if not stages:
                named = ", ".join(model.kind_name() for model in kinds if section in model.model_fields)
                raise ConfigError(
                    f"{base.place}: {section}: no stage has a {section} section (stages of kind {named} do); delete it"
                )
            for path, leaf in base.leaves((section,)):
                if (leaf.source == COMMAND_LINE) == typed and all(_sets(stage, path) for stage in stages.values()):
                    instead = " or ".join({f"{dotted(stage.path)}.{dotted(path)}": 0 for stage in stages.values()})
                    raise ConfigError(
                        f"{leaf.place}: {dotted(path)}: has no effect, every stage sets its own; set {instead}"
                    )


def _sets(stage: Node, path: KeyPath) -> bool:
    """Whether the stage itself decides the value at this path: there, above it (`lora: null`), or below it."""
    node: Node | None = stage
    for key in path:
        node = node.child(key) if node is not None else None
        if node is None:
            return False
        if not isinstance(node.value, dict):
            return True
    return True


def _kinds_known(root: Node, kinds: Stages) -> bool:
    stages = root.section.get("stages")
    named = stages.section.values() if stages is not None else ()
    return bool(named) and all(_fields(stage, kinds) for stage in named)


# ----------------------------------------------------------------------------------------------- origins


def _origins(recipe: Recipe, root: Node) -> dict[str, ValueOrigin]:
    presets: dict[KeyPath, ValueOrigin] = {}
    for name, stage in recipe.stages.items():
        for section, preset, values in _presets(stage):
            for path, _ in leaves(values):
                presets["stages", name, section, *path] = ValueOrigin(kind="preset", text=f"preset {preset}")
    origins: dict[str, ValueOrigin] = {}
    for path, _ in leaves(recipe.model_dump()):
        node = root.find(path)
        if node is None:
            origins[dotted(path)] = presets.get(path, DEFAULT)
        else:
            origins[dotted(path)] = ValueOrigin(kind="file" if node.line else "command line", text=node.place)
    return origins


def _presets(stage: StageBase) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(section, name, values) of the presets that a stage names."""
    for key, section in children(stage):
        named = getattr(section, "preset", None)
        if named is not None:
            yield key, named, section.presets[named]


def leaves(value: object, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    """(path, value) of all that is no section; a list of sections is walked, a list of values is one value."""
    children: list[tuple[Key, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        children = list(enumerate(value))
    if not children:
        yield prefix, value
    for key, child in children:
        yield from leaves(child, (*prefix, key))
