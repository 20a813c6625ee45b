"""What the commands do: take a loaded recipe, build the world, run, and say in a record what came of it."""

from __future__ import annotations

import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from whet.config.loading import Loaded
from whet.files import read_json, writing
from whet.launch.check import check_ahead
from whet.launch.memory import frugal, require_offload, trainings
from whet.launch.ranked import RankedWorld, build_world
from whet.launch.world import LocalWorld
from whet.models.device import give_memory_back, keep_memory, pick_threads
from whet.models.matmul import library, use_library
from whet.pipeline.card import evaluations
from whet.pipeline.kinds import KINDS
from whet.pipeline.lineage import UNDECIDED, Choices
from whet.pipeline.run import Run
from whet.pipeline.run import run_recipe as run_pipeline
from whet.pipeline.stage import Interrupted, Kind
from whet.tracking.console import Console
from whet.training.group import GroupFailure

PACKAGES = ("whet", "torch", "transformers", "tokenizers", "peft", "datasets", "numpy", "math-verify")


def run_recipe(
    loaded: Loaded, *, quiet: bool = False, choices: Choices = UNDECIDED, kinds: Sequence[Kind] = KINDS
) -> dict[str, Any]:
    """Run a recipe to its end. Raises `KeyboardInterrupt` when it was asked to stop, with everything saved."""
    recipe = loaded.recipe
    run = Run(recipe=recipe, folder=recipe.folder, kinds=kinds)
    console = Console(quiet=quiet)
    require_offload(run)
    before = _about_before(run)
    # Sums in another order differ in the last bit, so a resumed run keeps the threads of its beginning, and the
    # library, which is chosen for that many.
    torch.set_num_threads(before["threads"] if before else pick_threads(recipe.threads))
    use_library(before["products"] if before else None)
    thrifty = any(frugal(train) for train in trainings(run).values())
    (give_memory_back if thrifty else keep_memory)()
    world = build_world(recipe, threads=torch.get_num_threads(), frugal=thrifty)
    with asked_to_stop(console) as stopped, closing(world):
        try:
            _run(run, world, console, stopped, choices)
        except Interrupted:
            console.say(f"stopped; everything is saved in {run.folder}, and the same command goes on")
            raise KeyboardInterrupt from None
    console.say(f"report: {run.folder / 'report.html'}")
    return {"run": str(run.folder), "report": str(run.folder / "report.html"), "evaluations": evaluations(run.folder)}


def _run(run: Run, world: LocalWorld, console: Console, stopped: Callable[[], bool], choices: Choices) -> None:
    """All stages; where the trainer's ranks fail, again from the last checkpoint with new ones.

    So many times without getting any further: a checkpoint that is newer gives all restarts back.
    """
    restarts, again, reached = run.recipe.machine.restarts.trainer, 0, run.reached
    about = {**_about(), "ranks": run.recipe.machine.trainer.ranks}
    ahead: Callable[[], None] = partial(check_ahead, run, console.say)
    while True:
        try:
            run_pipeline(run, world, console, stopped, about=about, ahead=ahead, choices=choices)
            return
        except GroupFailure as failure:
            again, before, reached = again + 1, reached, run.reached
            if reached != before:
                again = 1
            if again > restarts:
                raise
            assert isinstance(world, RankedWorld), "only ranks fail so"
            world.failed(failure)
            console.say(f"{failure}; new ranks go on from the last checkpoint (restart {again} of {restarts})")
            ahead, choices = (lambda: None), replace(choices, restart=())


@contextmanager
def asked_to_stop(console: Console) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is looked at between steps; the second one stops at once.

    Signals come to the main thread alone: in another one nothing is turned into anything.
    """
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        with suppress(RuntimeError):  # the signal came in the middle of another line
            console.say("stopping after this step; once more to stop at once")

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _about() -> dict[str, Any]:
    """What a stranger needs to know to repeat a run, besides its recipe."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(),
        "products": library(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {package: version(package) for package in PACKAGES},
    }


def _about_before(run: Run) -> Mapping[str, Any] | None:
    path = run.folder / "run.json"
    with writing(path, 0):  # a folder that may not be looked into may not be written either
        return read_json(path) if path.is_file() and run.has_begun else None
