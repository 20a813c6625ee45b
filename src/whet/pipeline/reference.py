"""The reference's log-probabilities of a data set: computed once, kept as files, gone on with where they stopped.

A preference stage's reference is the model that it starts from, so its log-probabilities are taken before the first
update, and no second model is ever in memory (nor an adapter switched off and on). They are an artifact of the stage:

    STAGE/reference/NAME/key.json              which rows they are of; the model is that of the recipe
    STAGE/reference/NAME/00000.safetensors     log p of the trained tokens of so many rows, one after another
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whet.errors import RunError
from whet.files import read_json, write_atomic, write_json
from whet.pipeline.stage import Context, Interrupted
from whet.records import Atom, TokenRow
from whet.training.base import Trainer
from whet.training.checkpoint import newest_generation

CHUNK_ROWS = 512
"""Rows of a file: what is lost, at most, when the pass is killed."""


class Referred(Sequence[Atom]):
    """Atoms with the column `ref_logp`, which is put in place when an atom is asked for."""

    def __init__(self, atoms: Sequence[Atom], chunks: Sequence[Tensor]) -> None:
        self._atoms = atoms
        counts = [row.trained_count for atom in atoms for row in atom.rows]
        flat = torch.cat(list(chunks))
        assert len(flat) == sum(counts), "one log-probability for each trained token"
        self._logps = torch.split(flat, counts)
        self._first = [0]
        for atom in atoms:
            self._first.append(self._first[-1] + len(atom.rows))

    def __len__(self) -> int:
        return len(self._atoms)

    @overload
    def __getitem__(self, index: int) -> Atom: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Atom]: ...
    def __getitem__(self, index: int | slice) -> Atom | Sequence[Atom]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows, first = self._atoms[index].rows, self._first[index]
        logps = self._logps[first : first + len(rows)]
        return Atom(
            rows=tuple(row.with_columns(ref_logp=tuple(x.tolist())) for row, x in zip(rows, logps, strict=True))
        )


def with_reference(context: Context, trainer: Trainer, atoms: Sequence[Atom], name: str) -> Referred:
    """The atoms with the log-probabilities of their rows under the trainer's weights, which must be untouched yet.

    What is on disk for these rows, and as it was written, is taken from there (the model cannot have changed: a run has
    one recipe). Raises `Interrupted` where the run was asked to stop, with everything so far on disk; `RunError` where
    the rows are no longer those that a checkpoint was made with.
    """
    folder, rows = context.folder / "reference" / name, [row for atom in atoms for row in atom.rows]
    key = {"rows": _digest(rows)}
    if folder.is_dir() and (not (folder / "key.json").exists() or read_json(folder / "key.json") != key):
        if newest_generation(context.checkpoints) is not None:
            raise RunError(
                f"{folder}: the {name} rows are not those that this run began with; put the data back, or remove "
                "the run folder to start over"
            )
        shutil.rmtree(folder)
    write_json(folder / "key.json", key)
    return Referred(atoms, list(_chunks(context, trainer, rows, folder)))


def _chunks(context: Context, trainer: Trainer, rows: Sequence[TokenRow], folder: Path) -> Iterator[Tensor]:
    for number, start in enumerate(range(0, len(rows), CHUNK_ROWS)):
        file, chunk = folder / f"{number:05d}.safetensors", rows[start : start + CHUNK_ROWS]
        logp_T = _read(file)
        if logp_T is None:
            if context.stopped():
                raise Interrupted
            logps = trainer.logprobs(chunk, temperature=1.0)
            logp_T = torch.tensor([x for row in logps for x in row], dtype=torch.float32)
            write_atomic(file, save({"logp": logp_T}, {"sha256": _sha256(logp_T)}))
        yield logp_T


def _read(file: Path) -> Tensor | None:
    """What a file holds; None where it is missing or damaged, so that it is computed (again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            logp_T, noted = opened.get_tensor("logp"), opened.metadata()
    except SafetensorError:
        return None
    return logp_T if noted == {"sha256": _sha256(logp_T)} else None


def _sha256(logp_T: Tensor) -> str:
    return hashlib.sha256(logp_T.numpy().tobytes()).hexdigest()


def _digest(rows: Iterable[TokenRow]) -> str:
    """SHA-256 of the tokens and their masks: it changes with the data, the template and the tokenizer."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.tokens, row.trained_count, row.shared]).encode())
    return found.hexdigest()
