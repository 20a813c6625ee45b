"""From a Python function to a tool: its JSON schema from type hints and docstring, and its arguments checked by it.

What reads hints and schemas is imported where it is used: plays may be in an environment that lacks it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints, runtime_checkable

from whet.errors import EnvironmentFailure
from whet.target import TargetError

if TYPE_CHECKING:
    from pydantic import BaseModel

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a policy may call."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    """Of its parameters."""
    model: type[BaseModel]
    """Reads its arguments: field `p0` is the first parameter, whatever its name."""
    schema: dict[str, Any]
    """In the OpenAI shape."""

    @property
    def name(self) -> str:
        """What it is called."""
        return str(self.schema["function"]["name"])

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the hints have them. Raises `ValueError`, one line, where they do not fit the schema."""
        from pydantic import ValidationError

        try:
            read = self.model.model_validate_json(json.dumps(given))
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False)
            raise ValueError("; ".join(f"{_place(fault['loc'])}{fault['msg']}" for fault in faults)) from error
        return {name: getattr(read, f"p{n}") for n, name in enumerate(self.names) if f"p{n}" in read.model_fields_set}


@dataclass(frozen=True, slots=True)
class RemoteTool:
    """A tool whose schema is another's, as it comes."""

    function: Callable[..., Any]
    schema: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], name: str, description: str, parameters: Mapping[str, Any]) -> RemoteTool:
        """With a schema in the OpenAI shape. Raises `TargetError` where nothing can check arguments against it."""
        if importlib.util.find_spec("jsonschema") is None:
            raise TargetError("tools of other frameworks need jsonschema where they run; pip install jsonschema")
        described = {"name": name, "description": description, "parameters": {"properties": {}, **parameters}}
        return cls(function, {"type": "function", "function": described})

    @property
    def name(self) -> str:
        """What it is called."""
        return str(self.schema["function"]["name"])

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As given. Raises `ValueError` where they do not fit the schema, `EnvironmentFailure` where it is none."""
        import jsonschema

        try:
            jsonschema.validate(given, self.schema["function"]["parameters"])
        except jsonschema.ValidationError as error:
            raise ValueError(f"{'.'.join(map(str, error.path))}: {error.message}".lstrip(": ")[:500]) from error
        except jsonschema.SchemaError as error:
            raise EnvironmentFailure(f"{self.name}: its parameters are no JSON schema ({error.message})") from error
        return dict(given)


@runtime_checkable
class Offers(Protocol):
    """A part of an environment whose tools are known once it runs."""

    def offered(self) -> Sequence[Tool | RemoteTool]:
        """Them, beside its methods."""


def as_tool(name: str, function: Callable[..., Any]) -> Tool:
    """The tool that a function or bound method is. Raises `TargetError`, with its place, where it cannot be one."""
    try:
        import docstring_parser
        from pydantic import ConfigDict, Field, PydanticUserError, create_model
    except ImportError as error:
        raise TargetError("tools need pydantic and docstring_parser where their class runs; install them") from error
    said = docstring_parser.parse(inspect.getdoc(function) or "")
    if not said.short_description:
        raise _refused(name, function, "has no docstring; say in one what it does")
    parameters = inspect.signature(function).parameters
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise _refused(name, function, f"has a type hint that cannot be read ({error}); import it") from error
    texts = {each.arg_name: each.description for each in said.params}
    fields: dict[str, Any] = {}
    for number, (key, parameter) in enumerate(parameters.items()):
        if parameter.kind not in NAMED:
            raise _refused(name, function, f"takes {parameter}, which no schema can say; name its parameters")
        if key not in hints:
            raise _refused(name, function, f"has no type hint for {key}; add one")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"p{number}"] = (hints[key], Field(default, alias=key, description=texts.get(key) or None))
    try:
        strict = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
        model = create_model(name, __config__=strict, **fields)
        schema = _untitled(model.model_json_schema())
    except (PydanticUserError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise _refused(name, function, f"has a parameter of a type that JSON cannot say ({why})") from error
    about = "\n".join(filter(None, [said.short_description, said.long_description]))
    described = {"name": name, "description": about, "parameters": {"properties": {}, **schema}}
    return Tool(function, tuple(parameters), model, {"type": "function", "function": described})


def _place(parts: tuple[int | str, ...]) -> str:
    return ".".join(map(str, parts)) + ": " if parts else ""


def _refused(name: str, function: Callable[..., Any], why: str) -> TargetError:
    code = inspect.unwrap(function).__code__ if inspect.isroutine(function) else None
    place = "" if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}: "
    return TargetError(f"{place}the tool {name} {why}")


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes of names."""
    if isinstance(schema, dict):
        kept = ((k, v) for k, v in schema.items() if not (k == "title" and isinstance(v, str)))
        return {key: _untitled(value) for key, value in kept}
    return [_untitled(each) for each in schema] if isinstance(schema, list) else schema
