"""What all sections of a recipe have in common: no key may be misspelled, nothing changes later, and `@stage` is what
an earlier stage made.

A section says by `refers_to` what its `path` may name. So one walk finds every reference when the recipe is loaded,
and another puts the real paths in when a stage runs; no section is forgotten by either.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer
from pydantic.json_schema import SkipJsonSchema

Made = Literal["model", "reward", "rows"]
"""What a stage leaves for later ones: a model that speaks, one that judges, or rows."""


class Strict(BaseModel):
    """A section of a recipe: immutable, and no key may be misspelled."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    refers_to: ClassVar[Made | None] = None
    """What `path: "@stage"` means in this section; None: its `path`, if it has one, names no stage."""

    free: ClassVar[frozenset[str]] = frozenset()
    """Keys that say where and how fast, not what: a run may change them when it resumes."""

    def mathematics(self) -> dict[str, Any]:
        """The section as JSON has it, without the keys that are `free` in it or in any section below."""
        return _without_free(self, self.model_dump(mode="json"))


def path_of(value: Any) -> Any:
    """Text as the section that it is short for: for a `BeforeValidator` of a section with a `path`."""
    return {"path": value} if isinstance(value, str) else value


PythonFile = Annotated[str, "content"]
"""`file.py:function`: what is in the file is part of what the recipe says."""


def _in_words(value: Any) -> Any:
    """An object of Python as text: its name, and a digest of its source, so that a changed one is noticed."""
    if isinstance(value, str) or not callable(value):
        return value
    try:
        source = inspect.getsource(value if hasattr(value, "__code__") or inspect.isclass(value) else type(value))
    except (OSError, TypeError):  # typed at a prompt: there is no source
        source = ""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16] if source else "unknown"
    return f"{getattr(value, '__name__', type(value).__name__)} (from Python, source {digest})"


PythonObject = Annotated[
    str | SkipJsonSchema[Callable[..., Any]], PlainSerializer(_in_words, return_type=str), "content"
]
"""The same, or in a recipe of Python the object itself."""


def _without_free(section: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    free = section.free if isinstance(section, Strict) else ()
    return {key: _kept(getattr(section, key, None), value) for key, value in dumped.items() if key not in free}


def _kept(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return _without_free(value, dumped)
    if isinstance(value, list):
        return [_kept(child, entry) for child, entry in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _kept(child, dumped[key]) for key, child in value.items()}
    return dumped


def walk(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a section and of all that is below it."""
    yield at, value
    for key, child in children(value):
        yield from walk(child, f"{at}.{key}" if at else key)


def references(section: Any) -> Iterator[tuple[str, str, Made]]:
    """(key path, `@name`, what it must be) of every reference in a section, however deep."""
    for at, part in walk(section):
        if isinstance(part, Strict) and part.refers_to is not None and (path := _reference(part)):
            yield f"{at}.path" if at else "path", path, part.refers_to


def with_references(value: Any, resolve: Callable[[Strict], Strict]) -> Any:
    """The same section in which every part whose `path` is a reference is replaced by `resolve(part)`."""
    if isinstance(value, BaseModel):
        changed = {key: new for key, child in children(value) if (new := with_references(child, resolve)) is not child}
        value = value.model_copy(update=changed) if changed else value
        return resolve(value) if isinstance(value, Strict) and _reference(value) else value
    if isinstance(value, list):
        items = [with_references(child, resolve) for child in value]
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
