"""A pass of a frozen model over all rows of a stage: computed once, kept as files, gone on with where it stopped.

FOLDER/00000.safetensors     what it said of so many rows, one after another, with a digest of the rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whet.files import write_atomic
from whet.pipeline.stage import Context, Interrupted
from whet.records import TokenRow

CHUNK_ROWS = 512
"""Rows of a file: what is lost, at most, when the pass is killed."""


def cached_forward(
    context: Context, folder: Path, rows: Sequence[TokenRow], read: Callable[[Sequence[TokenRow]], Tensor]
) -> Iterator[Tensor]:
    """What `read` says of the rows, one tensor for each `CHUNK_ROWS` of them, in order.

    What is on disk for these rows, as it was written, is taken from there; which model it is of is the business of the
    stage's identity. Raises `Interrupted` where the run was asked to stop, with everything so far on disk.
    """
    for number, start in enumerate(range(0, len(rows), CHUNK_ROWS)):
        file, chunk = folder / f"{number:05d}.safetensors", rows[start : start + CHUNK_ROWS]
        said = _saved(file, chunk)
        if said is None:
            if context.stopped():
                raise Interrupted
            said = read(chunk).cpu()
            write_atomic(file, save({"said": said}, {"sha256": _digest(chunk, said)}))
        yield said
    for stale in sorted(folder.glob("*.safetensors"))[len(range(0, len(rows), CHUNK_ROWS)) :]:
        stale.unlink()


def _saved(file: Path, rows: Sequence[TokenRow]) -> Tensor | None:
    """What a file holds; None where it is missing, damaged or of other rows, so that it is computed (again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            said, noted = opened.get_tensor("said"), opened.metadata()
    except SafetensorError:
        return None
    return said if noted == {"sha256": _digest(rows, said)} else None


def _digest(rows: Sequence[TokenRow], said: Tensor) -> str:
    """SHA-256 of the tokens, their masks and what was said: it changes with the data, the template, the tokenizer."""
    found = hashlib.sha256(said.numpy().tobytes())
    for row in rows:
        found.update(b"%d %d %d " % (len(row.tokens), row.shared, len(row.columns)))
        found.update(row.tokens.tobytes() + np.packbits(row.trained).tobytes())
    return found.hexdigest()
