"""Checkpoints: generations of one folder, each complete or absent.

A generation is written beside its final name, sealed with the hashes of its files, and renamed; only then are
older ones removed. Resume takes the newest that verifies and says which it passed over, and why.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from whet.errors import RunError
from whet.files import folder_size, seal, sync_folder, unseal, writing
from whet.records import State

FORMAT = 3
TABLES = "tables.safetensors"
"""The arrays of a step's state; its numbers stand in the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A verified checkpoint: its folder, its step, and what the algorithm noted with it."""

    folder: Path
    step: int
    state: State
    passed_over: tuple[str, ...] = ()
    """Newer generations that are damaged, one line each."""


def save_generation(
    root: Path, step: int, state: State, write: Callable[[Path], None], *, keep: int, spare: int = -1
) -> Path:
    """Write, seal and rename a generation; then prune to `keep` and that of the step `spare`.

    Raises `RunError` where the disk refuses.
    """
    final, part = root / f"step-{step:08d}", root / f".part-{step:08d}-{os.getpid()}"
    newest = _generations(root)[:1]
    with writing(final, sum(folder_size(folder) for folder, _ in newest)):
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(".part-*"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            part.mkdir()
            write(part)
            tables = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
            if tables:
                save_file(tables, part / TABLES)
            numbers = {name: value for name, value in state.items() if name not in tables}
            seal(part, {"format": FORMAT, "step": step, "state": numbers})
            if final.exists():
                shutil.rmtree(final)
            os.replace(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync_folder(root)
    for folder, number in _generations(root)[keep:]:
        if number != spare:
            shutil.rmtree(folder, ignore_errors=True)
    return final


def newest_generation(root: Path) -> Generation | None:
    """The newest generation that verifies; None where there is none at all.

    Raises `RunError` where there are some and all are damaged: starting over would lose them silently.
    """
    passed_over: list[str] = []
    found = _generations(root)
    for folder, step in found:
        try:
            facts: dict[str, Any] = unseal(folder)
        except RunError as error:
            passed_over.append(str(error))
            continue
        if facts["format"] != FORMAT:
            raise RunError(
                f"{folder}: written by another whet (format {facts['format']}, this one has {FORMAT}); use that "
                "version, or start over (--restart)"
            )
        tables = load_file(folder / TABLES) if (folder / TABLES).exists() else {}
        state = {**facts["state"], **tables}
        return Generation(folder=folder, step=step, state=state, passed_over=tuple(passed_over))
    if found:
        raise RunError(f"{root}: no checkpoint can be used ({'; '.join(passed_over)}); remove the folder to start over")
    return None


def generation_at(root: Path, step: int) -> Path:
    """The folder of the generation of this step. Raises `RunError` where it is missing or damaged."""
    folder = root / f"step-{step:08d}"
    unseal(folder)
    return folder


def _generations(root: Path) -> list[tuple[Path, int]]:
    """(folder, step), newest first."""
    if not root.is_dir():
        return []
    found = [(path, int(match[1])) for path in root.iterdir() if (match := re.fullmatch(r"step-(\d{8})", path.name))]
    return sorted(found, key=lambda pair: -pair[1])
