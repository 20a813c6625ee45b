"""The tensors of a checkpoint: a safetensors file each kind from one process, shards from several ranks.

Shards are torch's distributed checkpoint (DCP) in the folder `ranks`: each rank writes its own part, and any number of
ranks reads them, one included. DCP keeps no checksums, so nothing here is called before the generation's seal has been
verified (`training.checkpoint`); and its index is a pickle, which a seal does not make harmless, so it is read only
where it names nothing but what DCP writes.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whet.errors import RunError
from whet.training.optim import sharded_like

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
