"""Users' code by its name: `file.py:function` or `module:function`. Standard library only: workers start with it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from itertools import takewhile
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
    # Not `vars`: a lazy package (trl.rewards) makes its names when they are asked for, and `dir` lists them.
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None or not callable(function):
        near = [key for key in difflib.get_close_matches(name, dir(module)) if callable(getattr(module, key, None))]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TargetError(f"{place} has no function {name!r}{hint}")
    return function


def describe(error: BaseException) -> str:
    """The error as one line, with the place that raised it."""
    if isinstance(error, TargetError):
        return str(error)[: 2 * LONGEST]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, AttributeError) and error.name and not isinstance(error.obj, ModuleType):
        near = difflib.get_close_matches(error.name, dir(error.obj), n=1)
        text += f"; did you mean {near[0]!r}?" if near else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[0] != "<"]
    if frames and frames[-1].filename != __file__:
        text = f"{text[:LONGEST]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return text[: 2 * LONGEST]


def _load_file(path: Path) -> ModuleType:
    """A file as a module, of its package where it lies in one (a folder with `__init__.py`): `from .x import y` works.

    Its folder goes to the *end* of the path: neighbours import, nothing is shadowed.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.py")], n=1)
        raise TargetError(f"{path} does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    path = path.resolve()
    packages = list(takewhile(lambda folder: (folder / "__init__.py").is_file(), path.parents))
    sys.path.append(str(path.parents[len(packages)]))
    if packages:
        module = importlib.import_module(".".join([*(each.name for each in reversed(packages)), path.stem]))
        if module.__file__ != str(path):
            raise TargetError(f"{path}: its package {packages[-1].name} is installed from {module.__file__} as well")
        return module
    name = f"whet_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
