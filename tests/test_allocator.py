"""What the C allocator does with freed memory, as a run tells it."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import torch
from whet.models.device import give_memory_back, keep_memory

def held_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20

for choose in (keep_memory, give_memory_back):
    choose()
    before = held_mb()
    tensors = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
    last = torch.ones(16)  # not the end of the heap
    full = held_mb() - before
    del tensors
    print(full, held_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
def test_freed_memory_is_kept_or_given_back() -> None:
    said = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    (full, kept), (again, left) = (map(int, line.split()) for line in said.splitlines())
    assert full >= 120 and kept >= 120, "the next tensors find it"
    assert again <= 160 and left <= 16, "the system has it back"
