"""Sinks of every step: the report of a run at work, and on request TensorBoard, Weights & Biases and trackio.

A stage is a tracker's run of its own, so that every stage counts its steps from 1. Only numbers and the recipe leave
through a tracker; prompts and completions stay in the rollout files. This is the one file that imports trackers.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from whet.errors import MissingExtra, RunError, boundary
from whet.records import Group

FIRST_S, EVERY_S = 5.0, 15.0
"""Seconds until it is drawn for the first time, and between two drawings at least."""
SHARE = 0.03
"""Of the time that drawing may take."""


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


@contextmanager
def trackers(kinds: Sequence[str], run: RunInfo, say: Callable[[str], None]) -> Iterator[list[Spared]]:
    """The trackers of these kinds, opened and closed at the end, however it comes.

    Raises `MissingExtra` where the package of one is not installed.
    """
    with ExitStack() as opened:
        told = [Spared(kind, SINKS[kind](run), say) for kind in dict.fromkeys(kinds)]
        yield [opened.enter_context(closing(tracker)) for tracker in told]


class Spared:
    """A tracker whose first failure is printed and ends it, not the run: the log files have everything."""

    def __init__(self, kind: str, sink: Tracker, say: Callable[[str], None]) -> None:
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


class LiveReport:
    """Draws the report after a step, or when `consider` is called, if it is due; a failure does not end the run."""

    def __init__(self, draw: Callable[[], object], say: Callable[[str], None]) -> None:
        """`draw` writes the page; `say` gets the first failure."""
        self._draw, self._say, self._failed = draw, say, False
        self._due = time.monotonic() + FIRST_S

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """A step was logged."""
        self.consider()

    def consider(self) -> None:
        """Draw if it is time."""
        began = time.monotonic()
        if began < self._due:
            return
        try:
            self._draw()
        except Exception as error:  # noqa: BLE001 - a drawing is no reason to end a run
            if not self._failed:
                self._say(f"the report could not be drawn ({type(error).__name__}: {error}); the run goes on")
            self._failed = True
        now = time.monotonic()
        self._due = now + max(EVERY_S, (now - began) / SHARE)


class Tracker:
    """A sink with a run of the tracker's own for each stage."""

    module: ClassVar[str]

    def __init__(self, run: RunInfo) -> None:
        """Raises `MissingExtra` where its package is not installed."""
        self._module, self._run = _require(self.module), run
        self._stages: dict[str, Any] = {}

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Every finite metric of the step."""
        if stage not in self._stages:
            with redirect_stdout(sys.stderr):  # some greet on standard output, which belongs to `--json`
                self._stages[stage] = self._begin(stage, step)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._write(self._stages[stage], step, finite)

    def close(self) -> None:
        """Write or upload what is left, and end the runs."""
        with redirect_stdout(sys.stderr):
            for each in self._stages.values():
                self._end(each)

    def _begin(self, stage: str, step: int) -> Any:
        raise NotImplementedError

    def _write(self, begun: Any, step: int, metrics: Mapping[str, float]) -> None:
        begun.log(metrics, step=step)

    def _end(self, begun: Any) -> None:
        begun.finish()


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard/STAGE; show them with `tensorboard --logdir RUN/tensorboard`.

    After a resume, repeated steps replace the old ones.
    """

    module = "tensorboard"

    def _begin(self, stage: str, step: int) -> Any:
        writer = _require("torch.utils.tensorboard").SummaryWriter
        return writer(str(self._run.folder / "tensorboard" / stage), purge_step=step)

    def _write(self, begun: Any, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            begun.add_scalar(name, value, step)

    def _end(self, begun: Any) -> None:
        begun.close()


class WandB(Tracker):
    """Runs grouped by our run's name, of the project `whet`; W&B's environment variables name another (WANDB_PROJECT),
    the account and the mode. Steps that a resumed stage repeats are left out by W&B, which has them."""

    module = "wandb"

    def _begin(self, stage: str, step: int) -> Any:
        return self._module.init(
            project=os.environ.get("WANDB_PROJECT") or "whet",
            group=self._run.name,
            name=f"{self._run.name}/{stage}",
            id=self._run.stage_id(stage),
            resume="allow",
            reinit="create_new",
            dir=str(self._run.folder),
            config=dict(self._run.recipe),
        )


class Trackio(Tracker):
    """Runs of the project `whet` in trackio's local database; `trackio show --project whet` opens them."""

    module = "trackio"

    def _begin(self, stage: str, step: int) -> Any:
        return self._module.init(
            project="whet",
            group=self._run.name,
            name=self._run.stage_id(stage),
            resume="allow",
            config=dict(self._run.recipe),
        )


SINKS: dict[str, Callable[[RunInfo], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def _require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed; pip install 'whet[track]'") from error
