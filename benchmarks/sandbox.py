"""Executions a second: programs in each profile of the sandbox, beside cold Python and bubblewrap, in turns.

    python -m benchmarks.sandbox [--rounds 5] [--jobs 100] [--workers 2]

Every job prints 42 and is checked. Rounds alternate between the ways, so that other work on the machine slows all of
them alike; the ratio to cold Python is of the medians. `--grades` times grades of MBPP-like rows as well.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from whet.envs.base import Attempt, Task
from whet.envs.rewards.code import CodeReward
from whet.errors import SandboxError
from whet.records import Message
from whet.sandbox.base import Limits
from whet.sandbox.programs import LocalSandbox

PROGRAM = "print(6 * 7)"
BUBBLEWRAP = ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "--tmpfs", "/tmp"]


def write(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--grades", action="store_true")
    options = parser.parse_args()
    boxes = dict(_boxes(options.workers))
    cold = [sys.executable, "-I", "-S", "-c", PROGRAM]
    ways: dict[str, Callable[[int], None]] = {name: _in_sandbox(box) for name, box in boxes.items()}
    ways["cold python -I -S"] = _commands(cold, options.workers)
    if shutil.which("bwrap"):
        ways["bubblewrap"] = _commands([*BUBBLEWRAP, *cold], options.workers)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way(options.jobs)
            rates[name].append(options.jobs / (time.perf_counter() - begun))
    base = statistics.median(rates["cold python -I -S"])
    for name, found in rates.items():
        middle = statistics.median(found)
        write(f"{name:18} {middle:7.0f} a second ({min(found):.0f} to {max(found):.0f}), {middle / base:.1f} x cold")
    if options.grades:
        _grades(next(iter(boxes.values())), options.jobs)
    for box in boxes.values():
        box.close()


def _boxes(workers: int) -> list[tuple[str, LocalSandbox]]:
    found = []
    for profile in ("strong", "default", "agentic"):
        try:
            found.append((profile, LocalSandbox(profile, workers=workers)))
        except SandboxError as error:
            write(f"{profile}: {error}")
    return found


def _in_sandbox(box: LocalSandbox) -> Callable[[int], None]:
    async def everyone(jobs: int) -> None:
        for outcome in await asyncio.gather(*(box.run(PROGRAM) for _ in range(jobs))):
            assert outcome.stdout == "42\n", outcome

    return lambda jobs: asyncio.run(everyone(jobs))


def _commands(command: list[str], workers: int) -> Callable[[int], None]:
    def one(_: int) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "42\n", done

    def everyone(jobs: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(jobs)))

    return everyone


def _grades(box: LocalSandbox, jobs: int) -> None:
    reward = CodeReward(name="code", weight=1.0, sandbox=box, limits=Limits())
    tests = [f"assert add({a}, 1) == {a + 1}" for a in range(3)]
    task = Task(id="add", messages=(), columns={"test_list": tests})
    said = (Message(role="assistant", content="def add(a, b): return a + b"),)
    attempt = Attempt(task=task, messages=said, completion_tokens=(), truncated=False, max_tokens=0)
    begun = time.perf_counter()
    assert all(grade.value == 1 for grade in reward.grade([attempt] * jobs, step=1))
    write(f"{'grades of 3 asserts':18} {jobs / (time.perf_counter() - begun):7.0f} a second")


if __name__ == "__main__":
    main()
