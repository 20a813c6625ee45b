"""Sections made from functions: a formula's keyword-only constants are the keys, said once, in its signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import Field, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema, core_schema

from whet.config.strict import Strict


class OneOf:
    """`Annotated[str, OneOf(TABLE)]`: one of the names of a table of functions, and an error names them all."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Exactly these strings."""
        return core_schema.literal_schema(self.names)


Section = TypeVar("Section", bound=Strict)


def section_of(
    function: Callable[..., Any], name: str, *, base: type[Section], kind: str | None = None, module: str | None = None
) -> type[Section]:
    """A section with a key for each keyword-only parameter: its type, range, default, and text as description.

    `kind`: the section is one of several that this key tells apart. `module`: where the class is put, so that pickle
    finds it.
    """
    fields: dict[str, Any] = {} if kind is None else {"kind": (Literal[kind], kind)}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            # Only these: the tensors beside them have a type that only torch knows.
            assert parameter.default is not parameter.empty, f"{name}.{parameter.name} has a published default"
            fields[parameter.name] = (_described(_hint(parameter, function)), parameter.default)
    made = create_model(name, __base__=base, __doc__=inspect.getdoc(function), __module__=module or __name__, **fields)
    if module is not None:
        setattr(sys.modules[module], name, made)
    return made


def _hint(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    text = parameter.annotation
    return eval(text, function.__globals__) if isinstance(text, str) else text


def _described(hint: Any) -> Any:
    """The hint with a text among its metadata as pydantic's description."""
    if get_origin(hint) is not Annotated:
        return hint
    plain, *metadata = get_args(hint)
    texts = [each for each in metadata if isinstance(each, str)]
    ranges = [each for each in metadata if not isinstance(each, str)]
    return Annotated[plain, *ranges, Field(description=texts[0] if texts else None)]
