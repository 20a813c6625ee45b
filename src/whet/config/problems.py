"""What is wrong with a recipe, in one line that names place, key and remedy.

pydantic reports a path through its own model, with the tags of unions in between. Here that path is laid back over
what the user wrote, so that the message carries the file's line and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from whet.config.names import KnownKeys, names
from whet.config.node import KeyPath, Node, dotted
from whet.config.recipe import INHERITED
from whet.config.stage import StageBase
from whet.errors import ConfigError


def explain(error: ValidationError, root: Node, recipe: type[BaseModel]) -> ConfigError:
    """The first problem of a recipe as one line, and how many more there are.

    `root` is the tree that was validated as a `recipe`. What was typed on the command line comes first, then the file
    in its order; missing keys last, for they are often there under a misspelled name.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(_written(details, root), []).append(details)
    given = _Given(root, recipe)
    problems = {_problem(path, group, given) for path, group in by_path.items()}
    first, *others = sorted(problems, key=lambda problem: (problem.missing, problem.line, problem.text))
    more = f" (and {len(others)} more problem{'s' * (len(others) > 1)})" if others else ""
    return ConfigError(first.text + more)


def nearest(name: str, valid: Sequence[str]) -> str:
    """`; did you mean 'lr'?`, or the valid names where none is near."""
    close = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of: {', '.join(valid)}" if valid else ""


@dataclass(frozen=True, slots=True)
class _Given:
    root: Node
    recipe: type[BaseModel]


@dataclass(frozen=True, slots=True)
class _Problem:
    missing: bool
    line: int
    text: str


def _written(details: ErrorDetails, root: Node) -> KeyPath:
    """The error's path without the tags and type names that are not in the recipe."""
    path: KeyPath = ()
    node = root
    for position, key in enumerate(details["loc"]):
        child = node.child(key)
        if child is not None:
            node, path = child, (*path, key)
        elif details["type"] == "missing" and position == len(details["loc"]) - 1:
            path = (*path, key)
    if details["type"].startswith("union_tag"):
        path = (*path, "kind")
    return path


def _problem(path: KeyPath, group: list[ErrorDetails], given: _Given) -> _Problem:
    node, depth = given.root, 0
    while depth < len(path) and (child := node.child(path[depth])) is not None:
        node, depth = child, depth + 1
    name = dotted((*node.path, *path[depth:]))
    text = _text(path, group, given)
    # A validator's message that begins with a key, `train.steps must ...`, is about that key.
    word = re.match(r"[\w-]+(?:\.[\w-]+)*", text)
    keys = [int(key) if key.isdecimal() else key for key in word[0].split(".")] if word else []
    about = node.find(tuple(keys)) if word and group[0]["type"] == "value_error" else None
    if about is not None and word is not None:
        return _Problem(False, about.line, f"{about.place}: {dotted(about.path)}{text.removeprefix(word[0])}")
    missing = group[0]["type"] in ("missing", "union_tag_not_found")
    return _Problem(missing, node.line, f"{node.place}: {name}: {text}" if name else f"{node.place}: {text}")


def _text(path: KeyPath, group: list[ErrorDetails], given: _Given) -> str:
    details = group[0]
    context = details.get("ctx", {})
    value = details["input"]
    match details["type"]:
        case "union_tag_not_found" if not isinstance(value, dict):
            return f"must be a section of keys, got {_show(value)}"
        case "missing":
            return f"missing{_hint(path, given)}"
        case "extra_forbidden":
            return f"unknown key{_suggestion(path, given)}"
        case "union_tag_not_found":
            return f"missing; one of: {', '.join(_literals(path, given))}"
        case "union_tag_invalid":
            tags, tag = str(context["expected_tags"]), value["kind"]
            return f"must be one of {tags}, got {_show(tag)}{_kind(tag, given) or _close(str(tag), tags)}"
        case "value_error":
            return details["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            return f"may have letters, digits, '.', '_' and '-', and begins with a letter or digit; got {_show(value)}"
    expected = list(dict.fromkeys(_expectation(each) for each in group))
    names = " ".join(str(each.get("ctx", {}).get("expected", "")) for each in group)
    return f"must be {' or '.join(expected)}, got {_show(value)}{_close(str(value), names)}"


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
}


def _expectation(details: ErrorDetails) -> str:
    """What should have stood there: `a whole number`, `at least 1`."""
    context = details.get("ctx", {})
    kind = details["type"]
    for key, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if key in context:
            return f"{words} {context[key]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind in ("too_short", "too_long") and "actual_length" in context:
        bound = context.get("min_length", context.get("max_length"))
        return f"a list of {'at least' if kind == 'too_short' else 'at most'} {bound}"
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind.split("_")[0] in _EXPECTED:
        return _EXPECTED[kind.split("_")[0]]
    return details["msg"].removeprefix("Input should be ")


def _show(value: object) -> str:
    """A value as the user may have written it, cut to fit a line."""
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _close(value: str, quoted: str) -> str:
    """`; did you mean ...?` if one of the quoted names is near."""
    close = difflib.get_close_matches(value.lower(), re.findall(r"'([^']*)'", quoted), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _hint(path: KeyPath, given: _Given) -> str:
    """What a required key is for: the first sentence of its description."""
    model = _model_at(path[:-1], given)
    field = model.model_fields.get(str(path[-1])) if model is not None else None
    return f"; {field.description.splitlines()[0].rstrip(chr(46))}" if field is not None and field.description else ""


def _suggestion(path: KeyPath, given: _Given) -> str:
    """What an unknown key is called here: its new name, ours for another tool's, its right section, or the nearest."""
    model, node, name = _model_at(path[:-1], given), given.root.find(path), str(path[-1])
    if model is None or node is None:
        return ""
    for renamed in names().renamed.get(name, ()):
        if renamed in model.model_fields:
            return f"; {name} is now called {renamed!r}"
    spelled = [(name,), *(each for leaf, _ in node.leaves((name,)) for each in (leaf, leaf[-1:]))]
    for known_as in map(dotted, spelled):
        if (known := names().known(known_as)) is not None:
            return f"; {_here(known_as, known, path, given)}"
    valid = [*model.model_fields, *(INHERITED if model is given.recipe else ())]
    home = None if difflib.get_close_matches(name, valid, n=1, cutoff=0.9) else _home(name, model, path, given)
    return f"; did you mean {home!r}?" if home else nearest(name, valid)


def _here(name: str, known: KnownKeys, path: KeyPath, given: _Given) -> str:
    """`learning_rate is 'train.lr' here`, or why there is no such key."""
    note = f": {known.note}" if known.note else ""
    for key in known.keys:
        if place := _place(tuple(key.split(".")), path, given):
            return f"{name} is {place!r} here{note}"
    for key in known.keys:
        if kinds := [stage.kind_name() for stage in _stages(given) if has_key(stage, key.split("."))]:
            return f"{name} is {key!r} of stages of kind {', '.join(kinds)}{note}"
    return known.note


def _home(name: str, model: type[BaseModel], path: KeyPath, given: _Given) -> str | None:
    """Where this very key belongs: in a section beside the one it was written in, or elsewhere in the stage."""
    sections = [(key,) for key, field in model.model_fields.items() if _container(field.annotation) is None]
    below = next((key for (key,) in sections if has_key(model, (key, name))), None)
    if below is not None:
        return f"{below}.{name}"
    stages = _stages(given)
    nested = [(stage, (key, name)) for stage in stages for key in stage.model_fields]
    for stage, candidate in [*((stage, (name,)) for stage in stages), *nested]:
        elsewhere = len(path) == 1 or candidate[:-1] != path[2:-1]
        if elsewhere and has_key(stage, candidate) and (place := _place(candidate, path, given)):
            return place
    return None


def _place(key: Sequence[str], path: KeyPath, given: _Given) -> str | None:
    """A stage's (or the recipe's) key as the section around `path` would have it; None: there is no such key there."""
    node = given.root.find(path)
    section = node.path[:-1] if node is not None else ()
    stages = given.root.child("stages")
    names = [path[1]] if path[0] == "stages" and len(path) > 1 else list(stages.section if stages is not None else ())
    inherited = key[0] in INHERITED and section[:1] != ("stages",)
    for name in names:
        stage = _model_at(("stages", name), given)
        if stage is not None and has_key(stage, key) and (inherited or section or not has_key(given.recipe, key)):
            full: KeyPath = tuple(key) if inherited else ("stages", name, *key)
            return dotted(full[len(section) :] if full[: len(section)] == section else full)
    return dotted(tuple(key)) if has_key(given.recipe, key) else None


def has_key(model: type[BaseModel], key: Sequence[str]) -> bool:
    """Whether a section has the key, in some form of it."""
    models = [model]
    for name in key:
        found = [each.model_fields[name].annotation for each in models if name in each.model_fields]
        if not found:
            return False
        models = [inner for annotation in found for inner in models_of(annotation)]
    return True


def _stages(given: _Given) -> list[type[StageBase]]:
    """The kinds of stages."""
    union = get_args(given.recipe.model_fields["stages"].annotation)[-1]
    return [model for model in models_of(union) if issubclass(model, StageBase)]


def presets_of(stages: Sequence[type[StageBase]]) -> dict[str, tuple[str, str]]:
    """Every preset by its name: the kind of stage that has it, and the key."""
    found: dict[str, tuple[str, str]] = {}
    for stage in reversed(stages):
        for key, field in stage.model_fields.items():
            for section in models_of(field.annotation):
                found |= dict.fromkeys(getattr(section, "presets", ()), (stage.kind_name(), key))
    return found


def _kind(tag: object, given: _Given) -> str:
    """Of a method in the place of a stage's kind, `dpo`: the kind and the key that has it as a preset."""
    presets = presets_of(_stages(given))
    if isinstance(tag, str) and tag in presets:
        return f"; write kind: {presets[tag][0]}, {presets[tag][1]}: {tag}"
    kinds = names().other_kinds
    return f"; write kind: {kinds[tag]}" if isinstance(tag, str) and tag in kinds else ""


def _literals(path: KeyPath, given: _Given) -> list[str]:
    """The names that a union's tag may have at this path."""
    annotation = _annotation_at(path[:-1], given)
    tags = [get_args(model.model_fields[str(path[-1])].annotation) for model in models_of(annotation)]
    return [str(name) for names in tags for name in names]


def _model_at(path: KeyPath, given: _Given) -> type[BaseModel] | None:
    node = given.root.find(path)
    value = node.plain() if node is not None else None
    return _pick(models_of(_annotation_at(path, given)), value)


def _annotation_at(path: KeyPath, given: _Given) -> Any:
    """The type that the recipe's models give to this path."""
    annotation: Any = given.recipe
    for depth, key in enumerate(path):
        container = _container(annotation)
        if container is not None:
            annotation = get_args(container)[-1 if get_origin(container) is dict else 0]
            continue
        node = given.root.find(path[:depth])
        model = _pick(models_of(annotation), node.plain() if node is not None else None)
        if model is None or str(key) not in model.model_fields:
            return None
        annotation = model.model_fields[str(key)].annotation
    return annotation


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a type: unions and `Annotated` taken apart."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for option in get_args(annotation) for part in _parts(option)]
    return [annotation]


def _container(annotation: Any) -> Any:
    return next((part for part in _parts(annotation) if get_origin(part) in (dict, list, tuple)), None)


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type allows; those of a list are not among them."""
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _pick(models: list[type[BaseModel]], value: object) -> type[BaseModel] | None:
    """Of a union's models the one that has the value's tag (a required literal: `kind`, `generate`), or its keys."""

    def fit(model: type[BaseModel]) -> tuple[int, int]:
        known = len(value.keys() & model.model_fields.keys()) if isinstance(value, dict) else 0
        return tags(model), known

    def tags(model: type[BaseModel]) -> int:
        literals = [
            (name, get_args(field.annotation))
            for name, field in model.model_fields.items()
            if field.is_required() and get_origin(field.annotation) is Literal
        ]
        return sum(isinstance(value, dict) and value.get(name) in names for name, names in literals)

    return max(models, key=fit, default=None)
