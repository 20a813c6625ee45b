"""Records as JSON and back, exactly: played groups that wait for their step are part of a checkpoint."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np


def as_json(value: Any) -> Any:
    """A record, with everything in it; its floats are written so that the same come back."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The record of this class that `as_json` wrote; what it holds is read by the annotations of its fields."""
    origin, inside = get_origin(kind), get_args(kind)
    if value is None or kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return from_json(next(each for each in inside if each is not type(None)), value)
    if origin is tuple:
        kinds = [inside[0]] * len(value) if inside[-1] is ... else inside
        return tuple(from_json(each, part) for each, part in zip(kinds, value, strict=True))
    if origin is Mapping:
        return {key: from_json(inside[1], each) for key, each in value.items()}
    if origin is np.ndarray:
        return np.array(value, get_args(inside[1])[0])
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        return kind(**{name: from_json(hints[name], each) for name, each in value.items()})
    return kind(value) if isinstance(kind, type) and issubclass(kind, Enum) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
