"""A pass of a frozen model over all rows of a stage: computed once, kept as files, gone on with where it stopped.

FOLDER/key.json              which rows it is over, and which model reads them
FOLDER/00000.safetensors     what it said of so many rows, one after another
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whet.errors import RunError
from whet.files import read_json, weights_of, write_atomic, write_json
from whet.pipeline.stage import Context, Interrupted
from whet.records import TokenRow
from whet.training.checkpoint import newest_generation

CHUNK_ROWS = 512
"""Rows of a file: what is lost, at most, when the pass is killed."""


def kept_pass(
    context: Context,
    folder: Path,
    rows: Sequence[TokenRow],
    read: Callable[[Sequence[TokenRow]], Tensor],
    *,
    model: str,
    trained: bool,
) -> Iterator[Tensor]:
    """What `read` says of the rows, one tensor for each `CHUNK_ROWS` of them, in order; `model` is where it comes from.

    What is on disk for these rows and this model, and as it was written, is taken from there. Of a model that is
    `trained` afterwards the checkpoints have the weights: once there is one, it does not matter what became of its
    folder. Raises `Interrupted` where the run was asked to stop, with everything so far on disk; `RunError` where the
    rows (the model) are no longer those that a checkpoint was made with.
    """
    key, noted = {"rows": _digest(rows), "model": weights_of(model)}, folder / "key.json"
    before = read_json(noted) if noted.exists() else {"rows": ""}
    if before != key and folder.is_dir():
        if newest_generation(context.checkpoints) is None:
            shutil.rmtree(folder)
        elif before["rows"] != key["rows"]:
            raise RunError(
                f"{folder}: the {folder.name} rows are not those that this run began with; put the data back, or "
                "remove the run folder to start over"
            )
        elif not trained:
            raise RunError(
                f"{model}: is not the model that this run began with; put it back, or remove the run folder to start "
                "over"
            )
    if not noted.exists():
        write_json(noted, key)
    for number, start in enumerate(range(0, len(rows), CHUNK_ROWS)):
        file = folder / f"{number:05d}.safetensors"
        said = _saved(file)
        if said is None:
            if context.stopped():
                raise Interrupted
            said = read(rows[start : start + CHUNK_ROWS]).cpu()
            write_atomic(file, save({"said": said}, {"sha256": _sha256(said)}))
        yield said


def _saved(file: Path) -> Tensor | None:
    """What a file holds; None where it is missing or damaged, so that it is computed (again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            said, noted = opened.get_tensor("said"), opened.metadata()
    except SafetensorError:
        return None
    return said if noted == {"sha256": _sha256(said)} else None


def _sha256(said: Tensor) -> str:
    return hashlib.sha256(said.numpy().tobytes()).hexdigest()


def _digest(rows: Iterable[TokenRow]) -> str:
    """SHA-256 of the tokens and their masks: it changes with the data, the template and the tokenizer."""
    found = hashlib.sha256()
    for row in rows:
        found.update(b"%d %d %d " % (len(row.tokens), row.shared, len(row.columns)))
        found.update(row.tokens.tobytes() + np.packbits(row.trained).tobytes())
    return found.hexdigest()
