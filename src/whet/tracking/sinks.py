"""TensorBoard, Weights & Biases and trackio: each repeats the numbers of the log, and only when asked for.

A stage is a tracker's run of its own, so that every stage counts its steps from 1. Only numbers and the recipe leave
through a tracker; prompts and completions stay in the rollout files. This is the one file that imports trackers.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from whet.errors import ConfigError, MissingExtra, RunError, boundary
from whet.records import Group
from whet.tracking.base import Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a tracker is told about a run."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    """The resolved recipe, as plain values."""

    def stage_id(self, stage: str) -> str:
        """The same for the same stage of the same folder, so that a resumed run goes on in its old curves."""
        where = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:8]
        return f"{self.name}-{stage}-{where}"


def open_sink(kind: str, run: RunInfo) -> Sink:
    """The tracker called `kind`: tensorboard, wandb or trackio.

    Raises `ConfigError` for another name and `MissingExtra` where its package is not installed.
    """
    if kind not in SINKS:
        near = difflib.get_close_matches(kind, SINKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"tracker {kind!r} is unknown, there are {', '.join(SINKS)}{hint}")
    return SINKS[kind](run)


@contextmanager
def trackers(kinds: Sequence[str], run: RunInfo, say: Callable[[str], None]) -> Iterator[list[Spared]]:
    """The trackers of these kinds, opened (`open_sink` says what it raises) and closed at the end, however it comes."""
    opened = [Spared(kind, open_sink(kind, run), say) for kind in dict.fromkeys(kinds)]
    try:
        yield opened
    finally:
        for tracker in opened:
            tracker.close()


class Spared:
    """A tracker that harms no run: its first failure is said, and it hears no more. The log files have everything."""

    def __init__(self, kind: str, sink: Sink, say: Callable[[str], None]) -> None:
        self._kind, self._sink, self._say = kind, sink, say
        self._failed = False

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Pass the step on."""
        self._spare(lambda: self._sink.log(stage, step, metrics, groups))

    def close(self) -> None:
        """Pass the end on."""
        self._spare(self._sink.close)

    def _spare(self, act: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with boundary(RunError, self._kind):
                act()
        except RunError as error:
            self._failed = True
            self._say(f"{error}; it hears no more of this run, whose log files have everything")


class TensorBoard:
    """Event files in RUN/tensorboard/STAGE; show them with `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, run: RunInfo) -> None:
        _require("tensorboard")
        self._module = _require("torch.utils.tensorboard")
        self._run = run
        self._writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Every finite metric as a scalar; after a resume, repeated steps replace the old ones."""
        if stage not in self._writers:
            folder = self._run.folder / "tensorboard" / stage
            self._writers[stage] = self._module.SummaryWriter(str(folder), purge_step=step)
        for name, value in _finite(metrics).items():
            self._writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event files."""
        for writer in self._writers.values():
            writer.close()


class WandB:
    """Runs grouped by our run's name, of the project `whet`; W&B's environment variables name another (WANDB_PROJECT),
    the account and the mode."""

    def __init__(self, run: RunInfo) -> None:
        self._module = _require("wandb")
        self._run = run
        self._runs: dict[str, Any] = {}

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Every finite metric; steps that a resumed stage repeats are left out by W&B, which has them."""
        if stage not in self._runs:
            self._runs[stage] = self._module.init(
                project=os.environ.get("WANDB_PROJECT") or "whet",
                group=self._run.name,
                name=f"{self._run.name}/{stage}",
                id=self._run.stage_id(stage),
                resume="allow",
                reinit="create_new",
                dir=str(self._run.folder),
                config=dict(self._run.recipe),
            )
        self._runs[stage].log(_finite(metrics), step=step)

    def close(self) -> None:
        """Upload what is left and end the runs."""
        for run in self._runs.values():
            run.finish()


class Trackio:
    """Runs of the project `whet` in trackio's local database; `trackio show --project whet` opens them."""

    def __init__(self, run: RunInfo) -> None:
        self._module = _require("trackio")
        self._run = run
        self._runs: dict[str, Any] = {}

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Every finite metric of the step."""
        if stage not in self._runs:
            with redirect_stdout(sys.stderr):  # it greets on standard output, which belongs to `--json`
                self._runs[stage] = self._module.init(
                    project="whet",
                    group=self._run.name,
                    name=self._run.stage_id(stage),
                    resume="allow",
                    config=dict(self._run.recipe),
                )
        self._runs[stage].log(_finite(metrics), step=step)

    def close(self) -> None:
        """Write what is left and end the runs."""
        with redirect_stdout(sys.stderr):
            for run in self._runs.values():
                run.finish()


SINKS: dict[str, Callable[[RunInfo], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def _require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed; pip install 'whet[track]'") from error


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
