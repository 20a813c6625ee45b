"""Token rows behind one another in one array: in memory where they are few, else in a content-addressed cache on disk.

    CACHE/rows/KEY/tokens.i32       all rows, 4 bytes a token; a trained token as its complement (-1 - token)
    CACHE/rows/KEY/columns.npz      numbers of each row: where it ends, its checksum, where it came from, ...
    CACHE/rows/KEY/dropped.jsonl    rows that were left out, and why
    CACHE/rows/KEY/manifest.json    written last

A row is read by its place and not mapped: mapped pages count as resident memory, and a file that is cut short under a
mapping ends the process. Each row has a checksum, so damage is noticed when it is read, and opening costs nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data.base import Origin
from whet.data.faults import Dropped, Lost
from whet.errors import RunError
from whet.files import MANIFEST, cache_folder, seal, unseal, writing

KEPT_TOKENS = 4 * 2**20
"""Fewer tokens stay in memory and leave nothing on the disk: they are made again in a few seconds."""

TOKENS, COLUMNS, DROPPED = "tokens.i32", "columns.npz", "dropped.jsonl"
ORIGIN = {"source": "l", "line": "q", "part": "q"}
"""Columns that say where a row came from; `part` is 0 where it is the whole of its line."""

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[Any]


class Rows:
    """Token rows with numbers; the tokens are read when they are asked for."""

    def __init__(
        self,
        columns: Mapping[str, Numbers],
        tokens: Tokens | Path,
        *,
        sources: Sequence[str],
        dropped: Sequence[Dropped],
        note: str = "",
    ) -> None:
        self.columns = columns
        """By name one number for each row."""
        self.dropped = tuple(dropped)
        """Rows that were left out, by the stage of reading that left them out."""
        self.note = note
        """Where the rows are kept, for people to read; empty where they are in memory only."""
        self._sources, self._tokens, self._file = sources, tokens, -1
        if isinstance(tokens, Path):
            self._file = os.open(tokens, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.columns["end"])

    @property
    def lengths(self) -> Numbers:
        """(N,) tokens of each row."""
        return np.diff(self.columns["end"], prepend=0)

    def origin(self, index: int) -> Origin:
        """Where a row came from."""
        source, line, part = (int(self.columns[name][index]) for name in ORIGIN)
        return Origin(source=self._sources[source], line=line, part=part or None)

    def tokens(self, index: int) -> tuple[Tokens, Flags]:
        """Tokens of a row, and which of them are trained. Raises `RunError` where the file is damaged."""
        start, end = int(self.columns["end"][index - 1]) if index else 0, int(self.columns["end"][index])
        if isinstance(self._tokens, Path):
            data = os.pread(self._file, 4 * (end - start), 4 * start)
            if checksum(data) != self.columns["checksum"][index]:
                with suppress(OSError):
                    (self._tokens.parent / MANIFEST).unlink()
                raise RunError(f"{self._tokens}: damaged; give the same command again, and the rows are made again")
            code: Tokens = np.frombuffer(data, np.int32)
        else:
            code = self._tokens[start:end]
        return code ^ (code >> 31), code < 0


class Writer:
    """Takes rows one after another; they move to the disk when they are many."""

    def __init__(self, columns: Mapping[str, str], open_folder: Callable[[], Path] | None) -> None:
        """`columns`: names of the numbers of each row, and their type codes in `array`. No folder: all in memory."""
        self._columns: dict[str, array[Any]] = {
            name: array(code) for name, code in {**columns, "end": "q", "checksum": "Q"}.items()
        }
        self._open_folder = open_folder
        self._held: list[bytes] = []
        self.size = self._held_size = 0
        """Tokens so far."""
        self.folder: Path | None = None
        """Where the rows are; None: in memory."""

    def append(self, data: bytes, numbers: Mapping[str, float]) -> None:
        """One more row, `coded`. Raises `RunError` where the disk refuses it."""
        self._held.append(data)
        self.size += len(data) // 4
        self._held_size += len(data) // 4
        for name, value in {**numbers, "end": self.size, "checksum": checksum(data)}.items():
            self._columns[name].append(value)
        if self._held_size > KEPT_TOKENS and self._open_folder is not None:
            self._write(self._open_folder)

    def finish(self) -> tuple[dict[str, Numbers], Tokens]:
        """The columns, and the tokens that are in memory still: all of them, or none."""
        if self.folder is not None and self._open_folder is not None:
            self._write(self._open_folder)
        return {name: np.array(values) for name, values in self._columns.items()}, np.frombuffer(
            b"".join(self._held), np.int32
        )

    def _write(self, open_folder: Callable[[], Path]) -> None:
        if self.folder is None:
            self.folder = open_folder()
        with _on_disk(self.folder), (self.folder / TOKENS).open("ab") as file:
            file.writelines(self._held)
        self._held, self._held_size = [], 0


def coded(tokens: Tokens, trained: Flags) -> bytes:
    """A row as it is kept."""
    return np.where(trained, ~tokens, tokens).tobytes()


def kept_rows(
    key: str | None,
    version: str,
    columns: Mapping[str, str],
    fill: Callable[[Writer], Sequence[Dropped]],
    sources: Sequence[str],
) -> Rows:
    """The rows of this key from the cache; or as `fill` writes them, and kept there where they are many.

    Without a key they are in memory. `version` is that of the code that makes them: rows of another one, cut short or
    damaged are made again, and `note` says so. Several processes may make the same rows at once: the first to be done
    keeps its own. `sources` names what the column `source` counts. Raises `RunError` where the disk is full.
    """
    home, why = cache_folder() / "rows", ""
    folder = home / (key or "")
    if key is not None and folder.exists():
        try:
            return _open(folder, version, sources, f"read from {folder}")
        except RunError as error:
            why = f"made again, since what was kept is not usable ({error})"
            shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as parts:
        opened = None if key is None else partial(parts.enter_context, _part(home, key))
        writer = Writer({**ORIGIN, **columns}, opened)
        dropped = fill(writer)
        known, tokens = writer.finish()
        if writer.folder is None:
            return Rows(known, tokens, sources=sources, dropped=dropped, note=why)
        with _on_disk(writer.folder):
            np.savez(writer.folder / COLUMNS, allow_pickle=False, **known)
            with (writer.folder / DROPPED).open("w") as file:
                file.writelines(json.dumps(line) + "\n" for line in _plain(dropped, sources))
            seal(writer.folder, {"version": version, "left_out_by": [each.unread for each in dropped]})
        try:
            writer.folder.rename(folder)
        except OSError as error:  # another process was first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        return _open(folder, version, sources, "; ".join(filter(None, [f"kept in {folder}", why])))


def checksum(data: bytes) -> int:
    """64 bits by which damage and equal rows are known."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------- folders


def _open(folder: Path, version: str, sources: Sequence[str], note: str) -> Rows:
    """Rows that are complete and of this version; `RunError` says why they are not."""
    found = unseal(folder, by_size=(TOKENS,))
    if found.get("version") != version:
        raise RunError(f"{folder}: another version of whet or of its tokenizers made it")
    with np.load(folder / COLUMNS, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    lost: list[list[Lost]] = [[] for _ in found["left_out_by"]]
    for line in (folder / DROPPED).read_text().splitlines():
        who, (source, number, part), reason, fault = json.loads(line)
        lost[who].append(Lost(Origin(source=sources[source], line=number, part=part), reason, fault))
    return Rows(
        columns,
        folder / TOKENS,
        sources=sources,
        dropped=tuple(Dropped(tuple(e), unread) for e, unread in zip(lost, found["left_out_by"], strict=True)),
        note=note,
    )


def _plain(dropped: Sequence[Dropped], sources: Sequence[str]) -> Iterator[list[Any]]:
    """What `_open` reads: the number of the reader that left the row out, its origin, the reason and the complaint."""
    for who, each in enumerate(dropped):
        for lost in each.rows:
            assert isinstance(lost.row, Origin), "rows come from somewhere"
            origin = [sources.index(lost.row.source), lost.row.line, lost.row.part]
            yield [who, origin, lost.reason, lost.fault]


LEFT_S = 60.0
"""Age from which an unfinished folder that no process holds was left by one that was killed."""


@contextmanager
def _part(home: Path, key: str) -> Iterator[Path]:
    """A folder of this process alone, gone with it; those of processes that were killed are removed."""
    with _on_disk(home):
        home.mkdir(parents=True, exist_ok=True)
        for other in home.glob(f"{key}.*.part"):
            with suppress(FileNotFoundError):  # its owner has just finished
                if time.time() - other.stat().st_mtime > LEFT_S and (handle := _hold(other)) is not None:
                    shutil.rmtree(other, ignore_errors=True)
                    os.close(handle)
        folder = Path(mkdtemp(prefix=f"{key}.", suffix=".part", dir=home))
    held = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """A lock on the folder; None: another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    try:
        with writing(folder / TOKENS, 0):
            yield
    except RunError as error:
        what, _, _ = str(error).partition("; ")
        raise RunError(
            f"{what}; tokenized rows are kept there: make room, or name a folder on another disk in WHET_CACHE"
        ) from error
