"""Checkpoints: generations of one folder, each complete or absent, and the tensors in them.

A generation is written beside its final name, sealed with the hashes of its files, and renamed; only then are
older ones removed. Resume takes the newest that verifies and says which it passed over, and why.

Tensors are a safetensors file of each kind from one process, shards from several ranks. Shards are torch's distributed
checkpoint (DCP) in the folder `ranks`: each rank writes its own part, and any number of ranks reads them, one included.
DCP keeps no checksums, so nothing of it is read before the generation's seal has been verified; and its index is a
pickle, which a seal does not make harmless, so it is read only where it names nothing but what DCP writes.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whet.errors import RunError
from whet.files import folder_size, seal, sync_folder, unseal, writing
from whet.records import State
from whet.training.optim import sharded_like

FORMAT = 3
TABLES = "tables.safetensors"
"""The arrays of a step's state; its numbers stand in the manifest."""
RANKS = "ranks"
"""The folder with shards, in a generation."""
Tensors = Mapping[str, Mapping[str, Tensor]]
"""Of each kind (weights, optimizer, a moved frozen model) the tensors by name."""
Like = Callable[[str, str], Tensor | None]
"""(kind, name): the tensor whose shards one of a checkpoint is to have; None: it is read whole."""
IN_INDEX = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What DCP's index names, by module; beside these, torch's types of numbers."""


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
                safetensors.numpy.save_file(tables, part / TABLES)
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
        tables = safetensors.numpy.load_file(folder / TABLES) if (folder / TABLES).exists() else {}
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


# -------------------------------------------------------------------------------------------- tensors


def write_tensors(folder: Path, state: Tensors) -> None:
    """A safetensors file of each kind."""
    for kind, tensors in state.items():
        save_file(dict(tensors), folder / f"{kind}.safetensors")


def write_shards(folder: Path, state: Tensors) -> None:
    """The shards of every rank; all of them must call it, with the same names."""
    from torch.distributed.checkpoint.state_dict_saver import save  # seconds: only where there are ranks

    flat = {f"{kind}/{name}": tensor for kind, tensors in state.items() for name, tensor in tensors.items()}
    save(flat, checkpoint_id=folder / RANKS)


def read_tensors(folder: Path, kinds: Collection[str], like: Like) -> dict[str, dict[str, Tensor]]:
    """What either wrote of these kinds, whatever the number of ranks was and is; no key for one that is not there."""
    if (folder / RANKS).is_dir():
        return _read_shards(folder / RANKS, kinds, like)
    files = {kind: folder / f"{kind}.safetensors" for kind in kinds}
    return {
        kind: {name: _as_shards(tensor, like(kind, name)) for name, tensor in load_file(file).items()}
        for kind, file in files.items()
        if file.exists()
    }


def _as_shards(tensor: Tensor, like: Tensor | None) -> Tensor:
    return tensor if like is None or like.shape != tensor.shape else sharded_like(tensor.to(like.device), like)


def _read_shards(folder: Path, kinds: Collection[str], like: Like) -> dict[str, dict[str, Tensor]]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _require_plain(folder / ".metadata")
    reader = FileSystemReader(folder)
    flat: dict[str, Tensor] = {}
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key, known in stored.items():
        kind, _, name = key.partition("/")
        if kind in kinds:
            near = like(kind, name)
            if near is None or near.shape != known.size:
                near = torch.empty(known.size, dtype=known.properties.dtype)
            flat[key] = torch.empty_like(near)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        load(flat, storage_reader=reader, no_dist=True)  # each rank finds what it needs by itself
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        kind, _, name = key.partition("/")
        found.setdefault(kind, {})[name] = tensor
    return found


class _Plain(pickle.Unpickler):
    """Finds what DCP's index names, and nothing that could be called to any effect."""

    def find_class(self, module: str, name: str) -> Any:
        """As `pickle`, for few names."""
        if name in IN_INDEX.get(module, ()) or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _require_plain(index: Path) -> None:
    with index.open("rb") as file:
        try:
            _Plain(file).load()
        except pickle.UnpicklingError as error:
            raise RunError(
                f"{index}: names {error}, which no checkpoint of whet does; do not go on from it unless you know who "
                "wrote it, and remove the folder to start over"
            ) from error
