"""A pass of a frozen model over all rows of a stage: computed once, kept as files, gone on with where it stopped.

FOLDER/00000.safetensors     what it said of so many rows, one after another, with a digest of the rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def kept_pass(
    context: Context, folder: Path, rows: Sequence[TokenRow], read: Callable[[Sequence[TokenRow]], Tensor]
) -> Iterator[Tensor]:
    """What `read` says of the rows, one tensor for each `CHUNK_ROWS` of them, in order.

    What is on disk for these rows, as it was written, is taken from there; which model it is of is the business of the
    stage's identity. Raises `Interrupted` where the run was asked to stop, with everything so far on disk.
    """
    for number, start in enumerate(range(0, len(rows), CHUNK_ROWS)):
        file, chunk = folder / f"{number:05d}.safetensors", rows[start : start + CHUNK_ROWS]
        of = _digest(chunk)
        said = _saved(file, of)
        if said is None:
            if context.stopped():
                raise Interrupted
            said = read(chunk).cpu()
            write_atomic(file, save({"said": said}, {"rows": of, "sha256": _sha256(said)}))
        yield said
    for stale in sorted(folder.glob("*.safetensors"))[len(range(0, len(rows), CHUNK_ROWS)) :]:
        stale.unlink()


def _saved(file: Path, of: str) -> Tensor | None:
    """What a file holds; None where it is missing, damaged or of other rows, so that it is computed (again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            said, noted = opened.get_tensor("said"), opened.metadata()
    except SafetensorError:
        return None
    return said if noted == {"rows": of, "sha256": _sha256(said)} else None


def _sha256(said: Tensor) -> str:
    return hashlib.sha256(said.numpy().tobytes()).hexdigest()


def _digest(rows: Iterable[TokenRow]) -> str:
    """SHA-256 of the tokens and their masks: it changes with the data, the template and the tokenizer."""
    found = hashlib.sha256()
    for row in rows:
        found.update(b"%d %d %d " % (len(row.tokens), row.shared, len(row.columns)))
        found.update(row.tokens.tobytes() + np.packbits(row.trained).tobytes())
    return found.hexdigest()
