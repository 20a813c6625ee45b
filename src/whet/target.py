"""Users' code by its name: `file.py:function` or `module:function`. Standard library only: workers start with it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

LONGEST = 300
"""Characters of an error's own words that are passed on."""


class TargetError(Exception):
    """The code to run cannot be found; the message stands alone, without the class name."""


def load_function(target: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Raises `TargetError` with a near name."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(f"{target!r} must be file.py:function or module:function")
    module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function: Callable[..., Any] | None = vars(module).get(name)
    if function is None or not callable(function):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TargetError(f"{place} has no function {name!r}{hint}")
    return function


def describe(error: BaseException) -> str:
    """The error as one line, with the place that raised it."""
    if isinstance(error, TargetError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[0] != "<"]
    if frames:
        text = f"{text[:LONGEST]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return text[: 2 * LONGEST]


def _load_file(path: Path) -> ModuleType:
    """A file as a module. Its folder goes to the *end* of the path: neighbours import, nothing is shadowed."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.py")], n=1)
        raise TargetError(f"{path} does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    sys.path.append(str(path.resolve().parent))
    name = f"whet_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
