"""`@stage` in a recipe: what an earlier stage made, a model or rows, wherever a section has a `path` to one.

A section says by `refers_to` what its `path` may name. So one walk finds every reference when the recipe is loaded,
and another puts the real paths in when a stage runs; no section is forgotten by either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

from whet.config.strict import Made, Strict

Section = TypeVar("Section", bound=BaseModel)


def references(value: Any, at: str = "") -> Iterator[tuple[str, str, Made]]:
    """(key path, `@name`, what it must be) of every reference in a section, however deep."""
    if isinstance(value, Strict) and value.refers_to is not None and (path := _reference(value)):
        yield f"{at}.path" if at else "path", path, value.refers_to
    for key, child in children(value):
        yield from references(child, f"{at}.{key}" if at else key)


def with_references(section: Section, resolve: Callable[[Strict], Strict]) -> Section:
    """The same section in which every part whose `path` is a reference is replaced by `resolve(part)`."""
    resolved: Section = _resolved(section, resolve)
    return resolved


def _resolved(value: Any, resolve: Callable[[Strict], Strict]) -> Any:
    if isinstance(value, BaseModel):
        changed = {key: new for key, child in children(value) if (new := _resolved(child, resolve)) is not child}
        value = value.model_copy(update=changed) if changed else value
        return resolve(value) if isinstance(value, Strict) and _reference(value) else value
    if isinstance(value, list):
        items = [_resolved(child, resolve) for child in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    return value


def _reference(value: Strict) -> str | None:
    path = getattr(value, "path", None)
    return path if value.refers_to is not None and isinstance(path, str) and path.startswith("@") else None


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Fields of a section and entries of a list: recipes keep sections nowhere else."""
    if isinstance(value, BaseModel):
        yield from ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, list):
        yield from ((str(index), child) for index, child in enumerate(value))
