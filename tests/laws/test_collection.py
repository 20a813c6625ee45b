"""Collecting the tests twice gives the same tests: workers that collect on their own must agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[2]


def collect() -> list[str]:
    """Ids of all tests, collected by a process of its own with hashes of its own."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "tests"]
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return [line for line in found.stdout.splitlines() if "::" in line]


def test_no_test_id_depends_on_the_clock_or_on_hashes(request: pytest.FixtureRequest) -> None:
    """What this process collected some time ago, be it a part of the tests, is what another collects now."""
    ours, theirs = [item.nodeid for item in request.session.items], collect()
    assert len(theirs) > 1000
    assert set(ours) <= set(theirs)
    assert len(ours) < len(theirs) or ours == theirs


def test_the_files_that_come_first_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
