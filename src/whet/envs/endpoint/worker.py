"""The process of one play: a function of Python, or a command with its own process, and the rewards that it returns.

Standard library only: it also runs in the interpreter of another environment.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from whet.errors import EnvironmentFailure
from whet.target import describe, load_function

TURNS = "turns"
"""Name under which a play's worth has its turns'."""
TAIL_BYTES = 1 << 16
"""Of what a command prints, which may be without end."""


def load(path: str, command: Sequence[str], options: Mapping[str, Any] = {}) -> Callable[[Mapping[str, Any]], Any]:
    """The function that plays one task: `{"worth": ...}`, `{"broken": why}` or `{"failed": why}`.

    A class is given the options in `load`, once, and an object of it is called.
    """
    function: Any = load_function(path) if path else None
    if isinstance(function, type):
        function.load(**options)  # type: ignore[attr-defined]
        function = function()

    def play(payload: Mapping[str, Any]) -> Any:
        if not payload:  # only to see whether it loads
            return {}
        os.environ.update(payload["env"])
        random.seed(payload["seed"])
        try:
            if function is None:
                return _run(command)
            value = function(payload["task"])
        except (EnvironmentFailure, ConnectionError) as error:
            return {"broken": describe(error)}
        except BaseException as error:  # noqa: BLE001 - SystemExit too: it is what became of this play
            return {"failed": describe(error)}
        return _worth(value, "the function returned")

    return play


def _run(command: Sequence[str]) -> dict[str, Any]:
    """Run it to its end. It is in this process's group, which is killed as one."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with ThreadPoolExecutor(2) as threads:  # both at once: it must not wait for a reader
        printed = list(threads.map(_end, (process.stdout, process.stderr)))
    process.wait()
    said, wrong = (text.decode(errors="replace").strip().rpartition("\n")[2] for text in printed)
    if process.returncode == os.EX_TEMPFAIL:
        return {"broken": f"it exited with code {os.EX_TEMPFAIL} (try again later): {wrong[:200]}"}
    if process.returncode:
        return {"failed": f"it exited with code {process.returncode}: {wrong[:200]}"}
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        return {"worth": {}}
    numbers = value.items() if isinstance(value, dict) else [("", value)]
    plain = all(isinstance(each, int | float) or (name, type(each)) == (TURNS, list) for name, each in numbers)
    return _worth(value, "its last line is") if plain else {"worth": {}}


def _end(stream: IO[bytes] | None) -> bytes:
    """The end of what comes; the rest is read and forgotten."""
    assert stream is not None, "a pipe"
    kept = b""
    with stream:
        while chunk := stream.read(TAIL_BYTES):
            kept = (kept + chunk)[-TAIL_BYTES:]
    return kept


def _worth(value: Any, what: str) -> dict[str, Any]:
    """A number, or named numbers, with a list of `turns` among them or not; None gives no reward."""
    parts = dict(value) if isinstance(value, Mapping) else {} if value is None else {"reward": value}
    turns = parts.pop(TURNS) if isinstance(parts.get(TURNS), list | tuple) else []
    try:
        worth = {str(name): float(part) for name, part in parts.items()}
        turns = [float(each) for each in turns]
    except (TypeError, ValueError):
        return {"broken": f"{what} {str(value)[:80]!r}; a reward is a number, named numbers or None"}
    if not all(map(math.isfinite, (*worth.values(), *turns))):
        return {"broken": f"{what} {str(value)[:80]!r}; a reward is finite"}
    return {"worth": {**worth, **({TURNS: turns} if turns else {})}}
