"""whet from Python: what `whet run` does, for a recipe that is a file or a mapping, and what came of it.

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

from whet.config import SamplingConfig
from whet.config.loading import load_recipe, split_overrides
from whet.config.node import dotted
from whet.config.places import presets_of
from whet.config.problems import nearest
from whet.config.recipe import STAGES
from whet.errors import ConfigError, DataError, RunError
from whet.files import is_sealed, read_json, write_atomic
from whet.launch.main import run_recipe
from whet.launch.talk import ChatSession, open_conversation
from whet.models.locate import locate, run_of
from whet.pipeline.card import evaluations
from whet.pipeline.lineage import Choices
from whet.tracking.log import read_metrics, read_rollout_table

SOURCES = ("data", "eval_data", "tasks")
"""Keys that may have rows."""
SECTION = {"path", "generate"}
"""Keys by which an entry of a list is a data set and no row."""

AnyPath = str | os.PathLike


class RunResults:
    """A run folder, finished or not, read anew at every call. Tables are pandas DataFrames (`docs/python.md`).

    Raises `RunError` where there is no run, or a stage that it does not have is named.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if run_of(str(folder)) is None or not self.folder.is_dir():
            there = sorted(str(recipe.parent) for recipe in self.folder.parent.glob("*/recipe.json"))
            raise RunError(f"{folder}: there is no run (no recipe.json){nearest(str(folder), there)}")

    def __repr__(self) -> str:
        return f"whet.Run({str(self.folder)!r})"

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe with every value."""
        return read_json(self.folder / "recipe.json")

    @property
    def stages(self) -> dict[str, str]:
        """Every stage of the recipe, in order: done, begun or waiting."""
        there = dict(self.folders())
        states = {name: "done" if is_sealed(folder) else "begun" for name, folder in there.items()}
        return {name: states.get(name, "waiting") for name in self.recipe["stages"]}

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The tables of evaluations by stage, as in `eval.json`."""
        return evaluations(self.folder)

    def metrics(self, stage: str | None = None) -> Any:
        """A row for each step: `stage`, `step`, `time_s` and the metrics; NaN where a step has none."""
        import pyarrow as pa

        rows = [{"stage": name, **line} for name, folder in self.folders(stage) for line in read_metrics(folder)]
        names = dict.fromkeys(["stage", "step", "time_s", *sorted({name for row in rows for name in row})])
        return pa.table({name: [row.get(name) for row in rows] for name in names}).to_pandas()

    def rollouts(self, stage: str | None = None, step: int | None = None) -> Any:
        """A row for each answer: `stage`, `model` (its label in an evaluation), and the columns of a rollout file."""
        import pyarrow as pa

        tables = []
        for name, folder in self.folders(stage):
            for log in (folder, *sorted(folder.iterdir())):
                if (table := read_rollout_table(log, step)) is not None:
                    label = None if log == folder else log.name
                    added = {"stage": [name] * len(table), "model": pa.array([label] * len(table), pa.string())}
                    tables.append(pa.table({**added, **{of: table[of] for of in table.column_names}}))
        frame = (pa.concat_tables(tables) if tables else pa.table({"messages": [], "parts": []})).to_pandas()
        return frame.assign(**{of: frame[of].map(json.loads) for of in ("messages", "parts")})

    def model(self, stage: str | None = None) -> Path:
        """The folder of the model that a stage made (none named: the last one), in the Hugging Face layout."""
        return Path(locate(self._named(stage))[0])

    def chat(self, stage: str | None = None, *, system: str = "", seed: int = 0, **sampling: Any) -> ChatSession:
        """A conversation with it, `.say(text)`; `sampling` has the keys of a recipe's section (temperature ...)."""
        return open_conversation(self._named(stage), SamplingConfig(**sampling), seed=seed, system=system)

    def folders(self, stage: str | None = None) -> list[tuple[str, Path]]:
        """Names and folders of the stages that have begun, in order; or the one that is named."""
        known = list(self.recipe["stages"])
        if stage not in (None, *known):
            raise RunError(f"{self.folder}: has no stage {stage!r}{nearest(str(stage), known)}")
        folders = ((folder.name.partition("-")[2], folder) for folder in sorted((self.folder / "stages").glob("*-*")))
        return [(name, folder) for name, folder in folders if stage in (None, name)]

    def _named(self, stage: str | None) -> str:
        return str(self.folder) if stage is None else f"{self.folder}@{stage}"


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


OF_THE_RUN = ("name", "save", "trackers", "threads", "machine")
"""Keys of `train` that are no stage's."""


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

    `out` is the run's folder, `runs/METHOD` (or NAME) by default. The keys of `OF_THE_RUN` are the recipe's.
    """
    whole = {key: keys.pop(key) for key in OF_THE_RUN if key in keys}
    presets, kinds = presets_of(STAGES), [stage.kind_name() for stage in STAGES]
    stage: dict[str, Any] = {"kind": method, **keys}
    if method in presets:
        kind, key = presets[method]
        if not isinstance(own := keys.get(key, {}), Mapping):
            raise ConfigError(f"{key} is {own!r}, and the method is {method!r} already; give one of them")
        stage |= {"kind": kind, key: {"preset": method, **own}}
    elif method not in kinds:
        raise ConfigError(f"{method!r} is no kind of stage and no preset{nearest(method, [*kinds, *presets])}")
    recipe = {"name": method, "out": out, "seed": seed, "model": model, **whole, "stages": {method: stage}}
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
        rows = given.get("path", "")
        return {**given, "path": _kept(rows, folder)} if _gives(rows) else given
    if not _gives(given):
        return given
    entries = list(given)
    if all(isinstance(each, AnyPath) or (isinstance(each, Mapping) and SECTION & each.keys()) for each in entries):
        return [_source(each, folder) for each in entries]
    return _kept(entries, folder)


def _gives(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, AnyPath | Mapping)


def _kept(rows: Iterable[Any], folder: Path) -> str:
    """The rows in a file that is named after them."""
    try:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"rows from Python: {error}; a row has texts, numbers, lists and mappings") from error
    path = folder / "given" / f"{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    if not path.exists():
        write_atomic(path, data)
    return str(path)
