"""The models of a recipe's sections laid over what was written: which keys may stand at a path, and where a key is."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from whet.config.node import KeyPath, Node, dotted
from whet.config.recipe import INHERITED
from whet.config.stage import StageBase


@dataclass(frozen=True, slots=True)
class Given:
    """What was written, and the recipe that it was read as."""

    root: Node
    recipe: type[BaseModel]


def place_of(key: Sequence[str], path: KeyPath, given: Given) -> str | None:
    """A stage's (or the recipe's) key as the section around `path` would have it; None: there is no such key there."""
    node = given.root.find(path)
    section = node.path[:-1] if node is not None else ()
    stages = given.root.child("stages")
    names = [path[1]] if path[0] == "stages" and len(path) > 1 else list(stages.section if stages is not None else ())
    inherited = key[0] in INHERITED and section[:1] != ("stages",)
    for name in names:
        stage = model_at(("stages", name), given)
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


def stages_of(given: Given) -> list[type[StageBase]]:
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


def literals_at(path: KeyPath, given: Given) -> list[str]:
    """The names that a union's tag may have at this path."""
    annotation = annotation_at(path[:-1], given)
    tags = [get_args(model.model_fields[str(path[-1])].annotation) for model in models_of(annotation)]
    return [str(name) for names in tags for name in names]


def model_at(path: KeyPath, given: Given) -> type[BaseModel] | None:
    """The form of the section at this path that fits what was written."""
    node = given.root.find(path)
    value = node.plain() if node is not None else None
    return _pick(models_of(annotation_at(path, given)), value)


def keys_at(path: KeyPath, given: Given) -> list[str]:
    """The keys of every form that the section may have beside the `kind` that it names."""
    node = given.root.find(path)
    section = node.section if node is not None else {}
    return [
        key for model in models_of(annotation_at(path, given)) if agrees(model, section) for key in model.model_fields
    ]


def agrees(model: type[BaseModel], section: Mapping[str, Node]) -> bool:
    """Whether the names in a section, such as its `kind`, are those of this form of it."""
    return all(name not in section or section[name].value in tags for name, tags in tags_of(model))


def annotation_at(path: KeyPath, given: Given) -> Any:
    """The type that the recipe's models give to this path."""
    annotation: Any = given.recipe
    for depth, key in enumerate(path):
        container = container_of(annotation)
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


def container_of(annotation: Any) -> Any:
    """The list or the mapping of sections that a type is, if it is one."""
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
        required = [pair for pair in tags_of(model) if model.model_fields[pair[0]].is_required()]
        return sum(isinstance(value, dict) and value.get(name) in names for name, names in required)

    return max(models, key=fit, default=None)


def tags_of(model: type[BaseModel]) -> list[tuple[str, tuple[object, ...]]]:
    """The keys of a section that have one of a few names."""
    fields = model.model_fields.items()
    return [(name, get_args(field.annotation)) for name, field in fields if get_origin(field.annotation) is Literal]
