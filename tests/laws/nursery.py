"""A process that has everything imported and forks: each child runs one `whet` command, and may be killed on its way.

A child counts what it does to the files of its run: opening one for writing, renaming, removing, making a folder.
Told to, it sends itself a signal just before one of these, so a test can stop a run at every point that could
matter, and no line of whet knows about it; or it copies the folder, which is what a kill there would leave, and goes
on. (A fork, because a start costs seconds; not a fork of the test process, because autograd cannot be used after one.)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whet.files import MANIFEST

ROOT = Path(__file__).resolve().parent.parent.parent
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

TIMES = ("time", "tokens_per_second")
NO_RESULT = (".lock", "report.html", "report.html.part", "digests.json")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one child does."""

    words: tuple[str, ...]
    """The command, as after `whet`."""
    folder: str
    """Where changes of files are counted."""
    at: int = 0
    """The change (from 1) before which the signals are sent; 0: never."""
    copies: tuple[int, ...] = ()
    """Changes before which the folder is copied, to `before-<number>` beside it: what a kill there would leave."""
    signals: tuple[int, ...] = (signal.SIGKILL,)
    file_bytes: int | None = None
    """Largest file that it may write, as if the disk were full beyond it."""
    kill_s: float | None = None
    """Seconds after which it is killed (SIGKILL), wherever it is."""
    kill_in: str = ""
    """The path from whose being there these seconds count; empty: from its start."""
    clock_s: float = 0.0
    """By how much its clock is fast; negative: it was set back."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of it."""

    code: int
    """Exit code, negative for a signal."""
    changes: int
    output: str
    errors: str


class Nursery:
    """The parent's end: `obey` runs one child to its end."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.laws.nursery", str(folder)]
        self._folder = folder
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def obey(self, *words: str, folder: Path, **changes: object) -> Done:
        """Run `whet` with these words."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = Order(words=words, folder=str(folder), **changes)  # type: ignore[arg-type]
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        output, errors = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        return Done(**answer, output=output, errors=errors)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def contents(folder: Path) -> dict[str, Any]:
    """Every file of the stages that says something; times of day and durations aside."""
    return {
        str(path.relative_to(folder)): value
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in NO_RESULT
        and (value := _value(path, str(folder.absolute()).encode())) is not None
    }


def _value(path: Path, place: bytes) -> Any:
    import pyarrow.parquet

    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.name == MANIFEST:
        return sorted(json.loads(path.read_text())["files"])
    if path.name in ("run.json", "recipe.json"):
        return "is there"
    if path.parent.name == "adapter" and path.suffix != ".safetensors":  # peft writes where the base model was
        return len(path.read_text().split("\n"))
    return path.read_bytes().replace(place, b"RUN")


def serve(folder: Path) -> None:
    """The other end."""
    import peft  # noqa: F401
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: F401

    import whet.launch.main  # noqa: F401
    from whet.config import ModelConfig
    from whet.models.load import load_model
    from whet.tracking.report import _template

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    # What is slow the first time: pandas behind pyarrow, the report's template, transformers' parameter names.
    pa.Table.from_pylist([{"a": 1}])
    _template()
    load_model(ModelConfig(path="whet:demo"))
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            order = json.loads(line)
            _run(Order(**order), folder, write)
        os.close(write)
        status = _wait(child, Order(**json.loads(line)))
        with os.fdopen(read) as counted:
            changes = int(counted.read() or 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "changes": changes}), flush=True)


def _wait(child: int, order: Order) -> int:
    """Its status when it has ended, or was killed."""
    began = None
    while order.kill_s is not None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if began is None and (not order.kill_in or os.path.exists(order.kill_in)):
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= order.kill_s:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitpid(child, 0)[1]


def _copy(folder: Path, to: Path) -> None:
    def copy(source: str, target: str) -> None:
        with suppress(FileNotFoundError):  # another thread renames the report
            shutil.copy2(source, target)

    shutil.copytree(folder, to, copy_function=copy)


def _run(order: Order, folder: Path, write: int) -> None:
    from whet.cli.app import main

    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes, order.file_bytes))
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + order.clock_s  # type: ignore[assignment]
    time.time_ns = lambda: clock_ns() + int(order.clock_s * 1e9)  # type: ignore[assignment]
    count = 0

    def watch(event: str, arguments: Sequence[object]) -> None:
        nonlocal count
        if not (event in CHANGES or event == "open") or not str(arguments[0]).startswith(order.folder):
            return
        # Of these when they are written is a matter of time.
        if any(name in str(arguments[0]) for name in ("digests.json", "report.html")):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        count += 1
        if count in order.copies:
            _copy(Path(order.folder), Path(order.folder).with_name(f"before-{count}"))
        if count == order.at:
            for number in order.signals:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    code = 70
    try:
        main(order.words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.write(write, str(count).encode())
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
