"""What waiting threads cost on a busy machine: `python -m benchmarks.threads [--turns N]`.

400 products of the size that a tiny model spends its time in, in processes of their own and in turns: one thread, two
that spin while they wait (GNU OpenMP's default), and two that spin as briefly as `whet` lets them. A JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from whet.cli.app import USUAL

SIDES: dict[str, tuple[int, dict[str, str]]] = {
    "one thread": (1, {}),
    "two that spin": (2, {"GOMP_SPINCOUNT": "300000"}),
    "two of whet": (2, USUAL),
}


def products(threads: int) -> None:
    """The work of one side."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.ones(2048, 128), torch.ones(128, 384)
    for _ in range(5):
        left @ right
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(400):
        (left @ right).relu_()
    say({"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)})


def say(line: dict[str, object]) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Every side in turn."""
    parser = argparse.ArgumentParser(description="what waiting threads cost")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        products(given.threads)
        return
    for _ in range(given.turns):
        for side, (threads, settings) in SIDES.items():
            command = [sys.executable, "-m", "benchmarks.threads", "--threads", str(threads)]
            made = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
            say({"side": side, **json.loads(made.stdout), "load": round(os.getloadavg()[0], 1)})


if __name__ == "__main__":
    main()
