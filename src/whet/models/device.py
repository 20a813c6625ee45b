"""What this machine computes fast: device, precision, threads. Measured, not looked up."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from whet.errors import ModelError

CLEARLY = 1.25
"""How many times faster all cores must be than one to be taken."""


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to compute on; `auto` takes a GPU where there is one."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ModelError("model.device is cuda, but torch sees no CUDA device; use auto or cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def pick_compute(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The precision of the forward pass; weights and sums stay in float32 whatever it is.

    `auto` takes bfloat16 on a GPU that has it. On a CPU it takes float32: most emulate bfloat16, up to a hundred
    times slower.
    """
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def pick_threads(wanted: int | Literal["auto"]) -> int:
    """How many CPU threads to use: the number given, that of OMP_NUM_THREADS, or the faster of one and all cores.

    On a busy machine two threads can be several times slower than one, so it is measured at the start of a run
    (a tenth of a second), on a product of the size that a tiny model spends its time in.
    """
    if wanted != "auto":
        return wanted
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    left, right = torch.ones(2048, 128), torch.ones(128, 384)
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    speed = {}
    for threads in {1, max(cores, 1)}:
        torch.set_num_threads(threads)
        speed[threads] = _seconds(partial(torch.matmul, left, right), repeats=25)
    torch.set_num_threads(before)
    # More threads must be clearly faster: once the machine gets busy they wait for each other.
    return cores if speed[cores] * CLEARLY < speed[1] else 1


def give_memory_back() -> None:
    """From now on the C allocator returns every tensor's memory at once, instead of keeping it for the next one.

    Kept pieces do not fit each other, so that a process holds far more than is alive: half as much again with
    gradient checkpointing (docs/memory.md). It costs up to a third of the speed: for those who asked for memory.
    """
    _set_allocator(own_from=2**18, kept=2**18)


def keep_memory() -> None:
    """From now on the C allocator keeps up to a GiB of what is freed for the next tensors, instead of 64 MiB.

    The kernel clears every page that it hands out again: 2 to 7 % of a training step (docs/benchmarks.md). Pieces of
    more than 32 MiB are still given back at once.
    """
    _set_allocator(own_from=2**25, kept=2**30)


def _set_allocator(*, own_from: int, kept: int) -> None:
    """glibc's: the bytes from which a piece is given back alone, and the free ones that it keeps at the heap's end."""
    if sys.platform == "linux":
        M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, own_from)
        libc.mallopt(M_TRIM_THRESHOLD, kept)


def _seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time of one call, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
