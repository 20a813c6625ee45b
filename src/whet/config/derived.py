"""Sections made from functions: a formula's keyword-only constants are the keys, said once, in its signature."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, ModelWrapValidatorHandler, create_model, model_validator
from pydantic_core import CoreSchema, core_schema

from whet.config.strict import PythonFile, Strict
from whet.target import TargetError, describe, load_function


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


class FromFile(Strict):
    """A section whose other keys are the keyword-only parameters of the function that `path` names."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    function: ClassVar[Callable[..., Any]]
    """What `path` names, once the section is read."""

    path: PythonFile
    """`file.py:function` or `module:function`."""

    @model_validator(mode="wrap")
    @classmethod
    def _with_constants(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        path = data.get("path") if isinstance(data, dict) and "function" not in vars(cls) else None
        return _from_file(cls, path, data) if isinstance(path, str) else handler(data)

    @property
    def constants(self) -> dict[str, Any]:
        """The function's keyword-only arguments."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in _constants(self.function)}


def _from_file(base: type[Section], path: str, data: Mapping[str, Any]) -> Section:
    try:
        function = load_function(path)
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        constants = _constants(function)
        if len(needed) != 1 or needed[0] in constants:
            raise TargetError(f"{path} needs ({', '.join(needed)}); it is given one argument, what else it takes is "
                              "keyword-only (behind a *) and has a default")  # fmt: skip
        if taken := [name for name in constants if name in base.model_fields]:
            raise TargetError(f"{path}: a parameter may not be called {taken[0]}, which is a key of its section")
        made = section_of(function, base.__name__, base=base)
    except (Exception, SystemExit) as error:
        raise ValueError(f"path: {describe(error)}") from error
    if unknown := next((key for key in data if key not in made.model_fields), None):
        near = difflib.get_close_matches(unknown, constants, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(constants) or 'none'}"
        raise ValueError(f"{unknown}: no parameter of {path}; {hint}")
    made.function = staticmethod(function)  # type: ignore[attr-defined]
    return made.model_validate(data)


def _constants(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _hint(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    text = parameter.annotation
    if text is parameter.empty:  # of a user's function
        number = isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
        return float if number else type(parameter.default)
    return eval(text, function.__globals__) if isinstance(text, str) else text


def _described(hint: Any) -> Any:
    """The hint with a text among its metadata as pydantic's description."""
    if get_origin(hint) is not Annotated:
        return hint
    plain, *metadata = get_args(hint)
    texts = [each for each in metadata if isinstance(each, str)]
    ranges = [each for each in metadata if not isinstance(each, str)]
    return Annotated[plain, *ranges, Field(description=texts[0] if texts else None)]
