"""Writing files so that a crash leaves the old one or the new one, and a full disk says what it needs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
