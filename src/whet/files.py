"""Writing files so that a crash leaves the old one or the new one, and a full disk says what it needs.

A folder is complete when its manifest exists: the manifest is written last, and lists every file with its size and
SHA-256, and its own, so that a damaged copy is known for one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from whet.errors import RunError, UserError


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn the ways in which a disk refuses `size` bytes (0: not known) at `path` into a `RunError` with a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            there = next(parent for parent in path.absolute().parents if parent.exists())
            free = shutil.disk_usage(there).free
            needed = f"{size:,}" if size else "more"  # before the first checkpoint its size is unknown
            raise RunError(
                f"{path}: the disk is full: {needed} bytes are needed and {free:,} are free (or a quota or limit is "
                "reached); make room and give the same command again, it resumes"
            ) from error
        raise RunError(
            f"{path}: cannot be written ({os.strerror(number)}); choose a run folder that you may write: out=FOLDER"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file by `data`, durably: a reader sees the old content or the new, never a part of it."""
    part = path.with_name(path.name + ".part")
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def cache_folder() -> Path:
    """Where whet keeps what it can make again: `WHET_CACHE`, else `whet` in the user's cache folder."""
    own = os.environ.get("WHET_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whet"


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


MANIFEST = "manifest.json"


def write_json(path: Path, value: Any) -> None:
    """Replace the file by this value as JSON."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object that `write_json` wrote; `RunError` where it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: damaged; it holds a {type(value).__name__}, not an object")
    return value


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declare a folder complete: make its files durable, then write the manifest with their hashes and these facts.

    What a write left that was cut off is removed. Raises `RunError` where the disk refuses.
    """
    for cut_off in folder.rglob("*.part"):
        cut_off.unlink()
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {**facts, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _sha256(manifest)})


def is_sealed(folder: Path) -> bool:
    """Whether the folder says that it is complete."""
    return (folder / MANIFEST).is_file()


def unseal(folder: Path, *, by_size: Collection[str] = ()) -> dict[str, Any]:
    """The facts of a complete folder whose files are as they were; `RunError` names the first that is not.

    Of those in `by_size`, which have checksums of their own, only the size is looked at.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.pop("sha256", None) != _sha256(manifest):
        raise RunError(f"{folder / MANIFEST}: damaged; its SHA-256 is not the one that it states")
    for name, known in manifest.pop("files").items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path}: missing, though the manifest lists it")
        if name in by_size:
            if path.stat().st_size != known["bytes"]:
                raise RunError(
                    f"{path}: cut short or grown; it has {path.stat().st_size:,} of {known['bytes']:,} bytes"
                )
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != known["sha256"]:
            raise RunError(f"{path}: damaged; its SHA-256 is not the one in the manifest")
    return manifest


@dataclass(frozen=True, slots=True)
class Digest:
    """What is in a file."""

    sha256: str
    bytes: int
    lines: int


def digest_file(file: Path) -> Digest:
    """Of a file's content; read once in a process as long as inode, size and times stay. Raises `OSError`."""
    return _digest(str(file), *_state(file))


SETTLED_NS = 2 * 10**9
"""Age from which on a file's times tell whether it has changed."""


class Digests:
    """The digests of files, kept in `path`: a file is read once, and again when it has changed.

    Its size, inode, and times of modification and of change tell whether it has; no program can set the last one back.
    A file that was written a moment ago is not remembered, because it could change within one tick of the clock. What
    was read is kept when the `with` block ends. A `path` that cannot be read is begun anew: it is only a hint.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._new = path, False
        self._known: dict[str, list[Any]] = {}
        if path is not None and path.is_file():
            with suppress(RunError):
                self._known = read_json(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._new and self._path is not None:
            write_json(self._path, self._known)

    def of(self, file: Path) -> Digest:
        """Of a file's content. Raises `OSError` where it cannot be read."""
        name, state = str(file.resolve()), list(_state(file))
        if name in self._known and self._known[name][0] == state:
            return Digest(*self._known[name][1])
        found = digest_file(file)
        if time.time_ns() - state[-1] > SETTLED_NS:
            self._known[name], self._new = [state, astuple(found)], True
        return found


def _state(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=256)
def _digest(file: str, *state: int) -> Digest:
    with open(file, "rb") as opened:
        hashed, lines, last = hashlib.sha256(), 0, b"\n"
        while part := opened.read(2**20):
            hashed.update(part)
            lines, last = lines + part.count(b"\n"), part[-1:]
    return Digest(hashed.hexdigest(), state[1], lines + (last != b"\n"))


def _sha256(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _error_number(error: Exception) -> int | None:
    """The operating system's word on a failed write; safetensors and tokenizers have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
