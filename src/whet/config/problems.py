"""What is wrong with a recipe, in one line that names place, key and remedy.

pydantic reports a path through its own model, with the tags of unions in between. Here that path is laid back over
what the user wrote, so that the message carries the file's line and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from whet.config import places
from whet.config.descriptions import descriptions
from whet.config.names import KnownKeys, names
from whet.config.node import KeyPath, Node, dotted
from whet.config.places import Given
from whet.config.recipe import INHERITED
from whet.errors import ConfigError


def explain(error: ValidationError, root: Node, recipe: type[BaseModel]) -> ConfigError:
    """The first problem of a recipe as one line, and how many more there are.

    `root` is the tree that was validated as a `recipe`. Unknown keys come first, for others follow from them; missing
    ones last. In between, what was typed on the command line, then the file in its order.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(_written(details, root), []).append(details)
    given = Given(root, recipe)
    meant = {path: group for path, group in by_path.items() if not _of_other_form(path, group[0]["type"], given)}
    problems = {_problem(path, group, given) for path, group in (meant or by_path).items()}
    first, *others = sorted(problems, key=lambda each: (each.missing, not each.unknown, each.line, each.text))
    more = f"and {len(others)} more problem{'s' * (len(others) > 1)}"
    unknown = [each.text.split(": ")[1] for each in others if each.unknown]
    also = f"; unknown too: {', '.join(unknown[:9])}" if unknown else ""
    return ConfigError(f"{first.text} ({more}{also})" if others else first.text)


def nearest(name: str, valid: Sequence[str], others: Sequence[str] = ()) -> str:
    """`; did you mean 'lr'?`, or the valid names where none of them (and none of the `others`) is near."""
    close = difflib.get_close_matches(name.lower(), [*valid, *others], n=1, cutoff=0.65)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of: {', '.join(valid)}" if valid else ""


@dataclass(frozen=True, slots=True)
class _Problem:
    missing: bool
    unknown: bool
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


def _of_other_form(path: KeyPath, kind: str, given: Given) -> bool:
    """Whether the complaint is about a key as another form of its section would have it, and not the one meant."""
    model = places.model_at(path[:-1], given) if kind in ("extra_forbidden", "missing") else None
    return model is not None and (path[-1] in model.model_fields) == (kind == "extra_forbidden")


def _problem(path: KeyPath, group: list[ErrorDetails], given: Given) -> _Problem:
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
        return _Problem(False, False, about.line, f"{about.place}: {dotted(about.path)}{text.removeprefix(word[0])}")
    kind = group[0]["type"]
    if kind == "union_tag_not_found" and (key := _misspelt(node, given)):
        return _Problem(False, True, key[0].line, f"{key[0].place}: {dotted(key[0].path)}: unknown key{key[1]}")
    missing = kind in ("missing", "union_tag_not_found")
    text = f"{node.place}: {name}: {text}" if name else f"{node.place}: {text}"
    return _Problem(missing, kind == "extra_forbidden", node.line, text)


def _misspelt(section: Node, given: Given) -> tuple[Node, str] | None:
    """Of a section without its `kind` a key that may be meant as that (or, of a loop, as `stages`), and the hint."""
    known = {name for stage in places.stages_of(given) for name in stage.model_fields}
    hints = ((child, nearest(key, ["kind", "stages"])) for key, child in section.section.items() if key not in known)
    return next(((child, hint) for child, hint in hints if "did you mean" in hint), None)


def _text(path: KeyPath, group: list[ErrorDetails], given: Given) -> str:
    details = group[0]
    context = details.get("ctx", {})
    value = details["input"]
    match details["type"]:
        case "union_tag_not_found" if not isinstance(value, dict):
            return f"must be a section of keys, got {_show(value)}{_own(path[:-1], given)}"
        case "missing":
            return f"missing{_hint(path, given)}"
        case "extra_forbidden":
            return f"unknown key{_suggestion(path, given)}"
        case "union_tag_not_found":
            code = [key for key, each in value.items() if isinstance(each, str) and OWN_CODE.fullmatch(each)]
            hint = (
                "; write kind: function" if code == ["path"] and "function" in places.literals_at(path, given) else ""
            )
            return f"missing{hint or '; one of: ' + ', '.join(places.literals_at(path, given))}"
        case "union_tag_invalid":
            tags, tag = str(context["expected_tags"]), value["kind"]
            return f"must be one of {tags}, got {_show(tag)}{_kind(tag, given) or _close(str(tag), tags)}"
        case "value_error":
            return details["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            return f"may have letters, digits, '.', '_' and '-', and begins with a letter or digit; got {_show(value)}"
    expected = list(dict.fromkeys(_expectation(each) for each in group))
    names = " ".join(str(each.get("ctx", {}).get("expected", "")) for each in group)
    hint = _own(path, given) or _close(str(value), names)
    return f"must be {' or '.join(expected)}, got {_show(value)}{hint}"


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


def _hint(path: KeyPath, given: Given) -> str:
    """What a required key is for: the first sentence of its description, or of its section's."""
    model, key = places.model_at(path[:-1], given), str(path[-1])
    if model is None or key not in model.model_fields:
        return ""
    sections = [each.__doc__ for each in places.models_of(model.model_fields[key].annotation)]
    text = next(filter(None, [descriptions(model).get(key), *sections]), "")
    return f"; {text.splitlines()[0].rstrip(chr(46))}" if text else ""


def _suggestion(path: KeyPath, given: Given) -> str:
    """What an unknown key is called here: its new name, ours for another tool's, its right section, or the nearest."""
    model, node, name = places.model_at(path[:-1], given), given.root.find(path), str(path[-1])
    if model is None or node is None:
        return ""
    for renamed in names().renamed.get(name, ()):
        if renamed in model.model_fields:
            return f"; {name} is now called {renamed!r}"
    if (twin := {"data": "tasks", "tasks": "data"}.get(name)) in model.model_fields:
        return f"; did you mean {twin!r}?"
    valid = [*model.model_fields, *(INHERITED if model is given.recipe else ())]
    typo = difflib.get_close_matches(name.lower(), [*valid, *places.keys_at(path[:-1], given)], n=1, cutoff=0.85)
    if not typo and (own := _own(path, given)):
        return own
    leaves = [] if typo else [leaf for leaf, _ in node.leaves((name,))]
    inner = [each for leaf in leaves for each in (leaf, leaf[-1:])]
    if len(leaves) == 1:  # a dotted key of the command line, whose last parts say most
        tried = [*inner, *((part,) for part in reversed(leaves[0][:-1]))]
    else:
        tried = [(name,), *inner]
    for known_as in map(dotted, tried):
        if (known := names().known(known_as)) is not None:
            inside = f"{known_as}: " * (known_as != name and not known.keys)
            return f"; {inside}{_here(known_as, known, path, given)}"
    home = None if typo else _home(name, model, path, given)
    near = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.6)
    if not home and not near and len(leaves) == 1 and len(leaves[0]) > 1:
        home = _home(str(leaves[0][-1]), model, path, given)
    return f"; did you mean {home!r}?" if home else nearest(name, valid, places.keys_at(path[:-1], given))


def _here(name: str, known: KnownKeys, path: KeyPath, given: Given) -> str:
    """`learning_rate is 'train.lr' here`, or why there is no such key."""
    note = f": {known.note}" if known.note else ""
    for key in known.keys:
        if place := places.place_of(tuple(key.split(".")), path, given):
            return f"{name} is {place!r} here{note}"
    for key in known.keys:
        if kinds := [stage.kind_name() for stage in places.stages_of(given) if places.has_key(stage, key.split("."))]:
            return f"{name} is {key!r} of stages of kind {', '.join(kinds)}{note}"
    return known.note


OWN_CODE = re.compile(r"(?!whet:)[\w./-]+:[A-Za-z_]\w*")
"""`file.py:function` or `module:function`."""


def _own(path: KeyPath, given: Given) -> str:
    """Of code of one's own where none is taken, `loss: mine.py:gentle`: where it goes, and how."""
    node = given.root.find(path)
    while node is not None and (short := next(iter(node.section.values()), None)) and short.path == node.path:
        node = short
    if node is None or not isinstance(node.value, str) or not OWN_CODE.fullmatch(node.value):
        return ""
    if keys := _code_keys(path, given):
        return f"; write {{{keys}: {node.value}}}"
    if keys := _code_keys(path[:-1], given):
        return f"; write {keys}: {node.value}"
    name = next(key for key in reversed(node.path) if isinstance(key, str))
    known = places.annotation_at(path, given) is not None
    found, elsewhere = [], []
    for each in names().own_code:
        if any(word in name.lower() for word in each.words):
            here = [name] if known and any(key.endswith(name) for key in each.keys) else []  # in another form
            tried = (*here, *(places.place_of(key.split("."), path, given) for key in each.keys))
            place = next(filter(None, tried), None)
            found += [f"{place}: {each.note}".replace("PATH", node.value)] if place else []
            kinds = [
                stage.kind_name() for stage in places.stages_of(given) if places.has_key(stage, each.keys[0].split("."))
            ]
            elsewhere.append(f"{each.keys[0]} of kind {', '.join(kinds)}")
    return f"; write {found[0]}" if found else f"; it is {' or '.join(elsewhere)}" if elsewhere else ""


def _code_keys(path: KeyPath, given: Given) -> str | None:
    """`kind: function, path`: what is missing in the section at this path, in some form of it, to name own code."""
    node = given.root.find(path)
    there = node.section if node is not None else {}
    for model in places.models_of(places.annotation_at(path, given)):
        code = [key for key, field in model.model_fields.items() if "content" in field.metadata and key not in there]
        if code and places.agrees(model, there):
            needed = {key: tags[0] for key, tags in places.tags_of(model) if model.model_fields[key].is_required()}
            return ", ".join([*(f"{key}: {tag}" for key, tag in needed.items() if key not in there), *code[:1]])
    return None


def _home(name: str, model: type[BaseModel], path: KeyPath, given: Given) -> str | None:
    """Where this very key belongs: in a section beside the one it was written in, or elsewhere in the stage."""
    stages = places.stages_of(given)
    if name in given.recipe.model_fields and not any(places.has_key(each, (name,)) for each in stages):
        return name
    sections = [(key,) for key, field in model.model_fields.items() if places.container_of(field.annotation) is None]
    below = next((key for (key,) in sections if places.has_key(model, (key, name))), None)
    if below is not None:
        return f"{below}.{name}"
    nested = [(stage, (key, name)) for stage in stages for key in stage.model_fields]
    for stage, candidate in [*((stage, (name,)) for stage in stages), *nested]:
        elsewhere = len(path) == 1 or candidate[:-1] != path[2:-1]
        if elsewhere and places.has_key(stage, candidate) and (place := places.place_of(candidate, path, given)):
            return place
    return None


def _kind(tag: object, given: Given) -> str:
    """Of a method in the place of a stage's kind, `dpo`: the kind and the key that has it as a preset."""
    presets = places.presets_of(places.stages_of(given))
    if isinstance(tag, str) and tag in presets:
        return f"; write kind: {presets[tag][0]}, {presets[tag][1]}: {tag}"
    kinds = names().other_kinds
    return f"; write kind: {kinds[tag]}" if isinstance(tag, str) and tag in kinds else ""
