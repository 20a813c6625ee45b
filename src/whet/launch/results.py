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
from whet.models.locate import is_run, locate
from whet.pipeline.stage import TABLES
from whet.tracking.log import read_metrics, read_rollout_table


class RunResults:
    """A run folder, finished or not, read anew at every call. Tables are pandas DataFrames (`docs/python.md`).

    Raises `RunError` where there is no run, or a stage that it does not have is named.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not is_run(str(folder)):
            raise RunError(f"{folder}: there is no run (no recipe.json)")

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
