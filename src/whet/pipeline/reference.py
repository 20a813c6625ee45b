"""What a frozen model says of a data set: computed once, before the first update, and kept in the stage's folder.

A preference stage's reference is the model that it starts from, so no second model is ever in memory (nor an adapter
switched off and on). A distillation's teacher is read before its student is loaded.

    STAGE/reference/NAME   STAGE/teacher/NAME
    .../00000.safetensors  what it said of so many rows, with a digest of the rows; gone on with where it stopped
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whet.config import OnlinePreferenceStage, PreferenceStage
from whet.data.base import Lazy
from whet.files import write_atomic
from whet.pipeline.stage import Context, Interrupted, Policy
from whet.records import Atom, TokenRow
from whet.training.base import REFERENCE, TEACHER, Trainer

REFERENCE_GAP = {"float32": 0.02, "bfloat16": 0.1}
"""Nats per token by which a model may be away from itself, read in another batch, by precision. bfloat16: 0.028 was
seen of SmolLM2-135M."""
Columns = Callable[[Tensor], Mapping[str, Tensor]]
"""A row's columns, from what was kept of its tokens."""


def largest_gap(config: PreferenceStage | OnlinePreferenceStage, policy: Policy) -> float:
    """How far the policy may be from its reference before the first update; any distance from another model."""
    if config.reference is not None:
        return inf
    return config.max_reference_gap or REFERENCE_GAP[policy.precision]


def with_reference(
    context: Context, trainer: Callable[[], Trainer], atoms: Sequence[Atom], name: str
) -> Sequence[Atom]:
    """The atoms with the column `ref_logp` of a trainer's weights, which must be untouched yet.

    It is asked for where there is something to read. Raises what `cached_forward` raises.
    """

    def read(rows: Sequence[TokenRow]) -> Tensor:
        return torch.from_numpy(np.concatenate(trainer().forward(rows, "logp")["logp"])).float()

    return _with_columns(context, f"{REFERENCE}/{name}", atoms, read, lambda kept: {"ref_logp": kept})


def with_teacher(
    context: Context, teacher: Callable[[], Trainer], atoms: Sequence[Atom], name: str, *, k: int, temperature: float
) -> Sequence[Atom]:
    """The atoms with `top_k/ids` and `top_k/logp`; the teacher is asked for only where something is still to be read.

    Raises what `cached_forward` raises.
    """

    def read(rows: Sequence[TokenRow]) -> Tensor:
        found = teacher().forward(rows, "top_k", top_k=k, temperature=temperature)
        ids, logp = (torch.from_numpy(np.concatenate(found[f"top_k/{part}"])) for part in ("ids", "logp"))
        return torch.cat([ids, logp.float().view(torch.int32)], -1)

    def columns(kept: Tensor) -> Mapping[str, Tensor]:
        ids, logp = kept.chunk(2, -1)
        return {"top_k/ids": ids, "top_k/logp": logp.view(torch.float32)}

    return _with_columns(context, f"{TEACHER}/{name}", atoms, read, columns)


def _with_columns(
    context: Context, place: str, atoms: Sequence[Atom], read: Callable[[Sequence[TokenRow]], Tensor], columns: Columns
) -> Sequence[Atom]:
    """The atoms with these columns, which are put in place when an atom is asked for."""
    rows = [row for atom in atoms for row in atom.rows]
    counts = [row.trained_count for row in rows]
    kept: list[Tensor] = []
    for chunk in cached_forward(context, context.folder / place, rows, read):
        kept += torch.split(chunk, counts[len(kept) : len(kept) + CHUNK_ROWS])
    ends = np.cumsum([0, *(len(atom.rows) for atom in atoms)]).tolist()

    def atom(index: int) -> Atom:
        said = (columns(each) for each in kept[ends[index] : ends[index + 1]])
        pairs = zip(atoms[index].rows, said, strict=True)
        return Atom(rows=tuple(row.with_columns(**{n: x.numpy() for n, x in c.items()}) for row, c in pairs))

    return Lazy(len(atoms), atom)


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
