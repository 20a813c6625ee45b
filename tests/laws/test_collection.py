"""Collecting the tests twice gives the same tests: workers that collect on their own must agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def collect(hash_seed: str) -> list[str]:
    """Ids of all tests, collected by a process of its own."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "tests"]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return [line for line in found.stdout.splitlines() if "::" in line]


def test_no_test_id_depends_on_the_clock_or_on_hashes() -> None:
    first = collect("1")
    second = collect("2")  # some seconds later: an id from the time of day has changed by now
    assert len(first) > 1000
    assert first == second
