"""`whet.Run`: what a run folder holds, for a notebook."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from whet.config import SamplingConfig
from whet.config.problems import nearest
from whet.errors import RunError
from whet.files import is_sealed, read_json
from whet.launch.talk import ChatSession, open_conversation
from whet.models.locate import locate
from whet.pipeline.stage import TABLES
from whet.tracking.log import read_metrics, read_rollout_table


class RunResults:
    """A run folder, finished or not, read anew at every call. Tables are pandas DataFrames (`docs/python.md`).

    Raises `RunError` where there is no run, or a stage that it does not have is named.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "recipe.json").is_file():
            raise RunError(f"{folder}: there is no run (no recipe.json)")

    def __repr__(self) -> str:
        return f"whet.Run({str(self.folder)!r})"

    @property
    def report(self) -> Path:
        """The report, an HTML page."""
        return self.folder / "report.html"

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe with every value."""
        return read_json(self.folder / "recipe.json")

    @property
    def stages(self) -> dict[str, str]:
        """Every stage of the recipe, in order: done, begun or waiting."""
        there = dict(self.folders())
        return {
            name: "waiting" if name not in there else "done" if is_sealed(there[name]) else "begun"
            for name in self.recipe["stages"]
        }

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The tables of evaluations by stage, as in `eval.json` or `perplexity.json`."""
        files = ((name, folder / file) for name, folder in self.folders() for file in TABLES)
        return {name: read_json(file) for name, file in files if file.is_file()}

    def metrics(self, stage: str | None = None) -> Any:
        """A row for each step: `stage`, `step`, `time_s` and the metrics; NaN where a step has none."""
        import pyarrow as pa

        rows = [{"stage": name, **line} for name, folder in self.folders(stage) for line in read_metrics(folder)]
        names = dict.fromkeys(["stage", "step", "time_s", *sorted({name for row in rows for name in row})])
        return pa.table({name: [row.get(name) for row in rows] for name in names}).to_pandas()

    def rollouts(self, stage: str | None = None, step: int | None = None) -> Any:
        """A row for each answer: `stage`, `model` (its label in an evaluation), and the columns of a rollout file."""
        import pyarrow as pa

        logs = [(name, folder, None) for name, folder in self.folders(stage)]
        logs += [(name, log, log.name) for name, folder, _ in tuple(logs) for log in sorted(folder.iterdir())]
        tables = [
            table.add_column(0, "stage", [[name] * len(table)]).add_column(
                1, "model", pa.array([label] * len(table), pa.string())
            )
            for name, log, label in logs
            if (table := read_rollout_table(log, step)) is not None
        ]
        frame = pa.concat_tables(tables).to_pandas() if tables else pa.table({}).to_pandas()
        for column in {"messages", "parts"} & set(frame):
            frame[column] = frame[column].map(json.loads)
        return frame

    def model(self, stage: str | None = None) -> Path:
        """The folder of the model that a stage made (none named: the last one), in the Hugging Face layout."""
        return Path(locate(self._named(stage))[0])

    def chat(self, stage: str | None = None, *, system: str = "", seed: int = 0, **sampling: Any) -> ChatSession:
        """A conversation with it, `.say(text)`; `sampling` has the keys of a recipe's section (temperature ...)."""
        return open_conversation(self._named(stage), SamplingConfig(**sampling), seed=seed, system=system)

    def _named(self, stage: str | None) -> str:
        return str(self.folder) if stage is None else f"{self.folder}@{stage}"

    def folders(self, stage: str | None = None) -> list[tuple[str, Path]]:
        """Names and folders of the stages that have begun, in order; or the one that is named."""
        if stage not in (None, *self.recipe["stages"]):
            raise RunError(f"{self.folder}: no stage {stage!r}{nearest(str(stage), list(self.recipe['stages']))}")
        folders = [(folder.name.partition("-")[2], folder) for folder in sorted((self.folder / "stages").glob("*-*"))]
        return [(name, folder) for name, folder in folders if stage in (None, name)]
