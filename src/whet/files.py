"""Writing files so that a crash leaves the old one or the new one, and a full disk says what it needs.

A folder is complete when its manifest exists: the manifest is written last, and lists every file with its size and
SHA-256, so that a damaged copy is known for one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.errors import RunError


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn the ways in which a disk refuses `size` bytes at `path` into a `RunError` with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise RunError(
                f"{path}: the disk is full: {size:,} bytes are needed and {free:,} are free (or your quota is spent); "
                "make room and give the same command again, it resumes"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise RunError(
                f"{path}: cannot be written ({os.strerror(error.errno)}); choose a run folder that you may write with `out=FOLDER`"
            ) from error
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file by `data`, durably: whoever reads sees the old content or the new, never a part of it."""
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


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declare a folder complete: make its files durable, then write the manifest with their hashes and these facts."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / MANIFEST, {**facts, "files": files})


def is_sealed(folder: Path) -> bool:
    """Whether the folder says that it is complete."""
    return (folder / MANIFEST).is_file()


def unseal(folder: Path) -> dict[str, Any]:
    """The facts of a complete folder whose files are as they were; `RunError` names the first that is not."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files = manifest.pop("files")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{folder}: the manifest cannot be read ({error})") from error
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path}: missing, though the manifest lists it")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != known["sha256"]:
            raise RunError(f"{path}: damaged; its SHA-256 is not the one in the manifest")
    return manifest
