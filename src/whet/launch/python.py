"""whet from Python: what `whet run` does, for a recipe that is a file or a mapping.

Where a recipe file has a path, a mapping may have the thing itself: rows, which are written to `RUN/given/`, reward
functions and environments.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.config.loading import load_recipe, split_overrides
from whet.config.node import dotted
from whet.config.problems import nearest, presets_of
from whet.config.recipe import STAGES
from whet.errors import ConfigError, DataError
from whet.files import write_atomic
from whet.launch.main import run_recipe
from whet.launch.results import RunResults
from whet.pipeline.lineage import Choices

SOURCES = ("data", "eval_data", "tasks")
"""Keys that may have rows."""
SECTION = {"path", "generate"}
"""Keys by which an entry of a list is a data set and no row."""

AnyPath = str | os.PathLike[str]


def run(
    recipe: AnyPath | Mapping[str, Any],
    *overrides: str,
    accept: Sequence[str] = (),
    restart: Sequence[str] = (),
    quiet: bool = False,
) -> RunResults:
    """Run a recipe, or go on with it; overrides are words as on the command line (`train.lr=1e-5`).

    Raises a `UserError` that says what to change, and `KeyboardInterrupt` when it was asked to stop, with everything
    saved: the same call goes on.
    """
    if isinstance(recipe, Mapping):
        said = {**recipe, **{dotted(key): value for key, value in split_overrides(overrides)}}
        recipe = _written(recipe, Path(said.get("out") or Path("runs") / str(said.get("name"))))
    loaded = load_recipe(recipe if isinstance(recipe, Mapping) else Path(recipe), overrides)
    return RunResults(run_recipe(loaded, quiet=quiet, choices=Choices(accept=accept, restart=restart))["run"])


def train(
    method: str,
    model: AnyPath | Mapping[str, Any],
    *,
    out: AnyPath | None = None,
    seed: int = 0,
    quiet: bool = False,
    **keys: Any,
) -> RunResults:
    """A run of one stage: `method` is a kind of stage (`sft`) or a preset (`grpo`, `dpo`), `keys` are the stage's.

    `out` is the run's folder, `runs/METHOD` by default.
    """
    presets, kinds = presets_of(STAGES), [stage.kind_name() for stage in STAGES]
    stage: dict[str, Any] = {"kind": method, **keys}
    if method in presets:
        kind, key = presets[method]
        if not isinstance(own := keys.get(key, {}), Mapping):
            raise ConfigError(f"{key} is {own!r}, and the method is {method!r} already; give one of them")
        stage |= {"kind": kind, key: {"preset": method, **own}}
    elif method not in kinds:
        raise ConfigError(f"{method!r} is no kind of stage and no preset{nearest(method, [*kinds, *presets])}")
    recipe = {"name": method, "out": out, "seed": seed, "model": model, "stages": {method: stage}}
    return run(recipe, quiet=quiet)


def _written(value: Any, folder: Path, key: str = "") -> Any:
    """A section with rows as files of the run, and functions and classes as sections."""
    if key in SOURCES:
        value = _source(value, folder)
    if key == "rewards":
        listed = value if isinstance(value, list | tuple) else [value]
        value = [{"kind": "function", "path": each} if callable(each) else each for each in listed]
    if key == "environment" and callable(value):
        value = {"path": value}
    if isinstance(value, Mapping):
        return {name: _written(child, folder, name) for name, child in value.items()}
    return value


def _source(given: Any, folder: Path) -> Any:
    """A data set, or a list of them, each a path or a section; anything else that gives mappings is rows."""
    if isinstance(given, Mapping):
        return {**given, "path": _source([given["path"]], folder)[0]} if "path" in given else given
    if isinstance(given, AnyPath) or not isinstance(given, Iterable):
        return given
    entries = list(given)
    if all(isinstance(each, AnyPath) or (isinstance(each, Mapping) and SECTION & each.keys()) for each in entries):
        return [_source(each, folder) for each in entries]
    try:
        data = "".join(json.dumps(row) + "\n" for row in entries).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"rows from Python: {error}; a row has texts, numbers, lists and mappings") from error
    path = folder / "given" / f"{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    if not path.exists():
        write_atomic(path, data)
    return str(path)
