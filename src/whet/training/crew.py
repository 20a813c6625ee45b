"""Work that several processes share: each does every nth part of it, and the parts arrive in order.

The processes are forks, so what they work on needs no sending; each sends its parts through a pipe, which holds a few.
One that is killed is noticed by its end of the pipe, and so is a reader that is killed: nothing is left behind.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from whet.errors import RunError, UserError

MOST = 8
"""Processes; each goes through all of the input to find its own parts."""
HELD = 2**20
"""Bytes of a pipe: the most that a user's own may hold."""
SILENT_S = 600.0
"""Time after which a process that has sent nothing is given up."""

_log = logging.getLogger(__name__)
Part = TypeVar("Part")
Steps = Callable[[int, int], Iterator[Part]]
"""Of n processes the kth's: `steps(k, n)` gives every nth part from the kth on."""


def cores() -> int:
    """Processes that may share the work. Beside other threads nothing is forked: one of them may hold a lock."""
    alone = sys.platform == "linux" and threading.active_count() == 1
    return min(MOST, len(os.sched_getaffinity(0))) if alone and not multiprocessing.current_process().daemon else 1


def in_turns(steps: Steps[Part], count: int) -> Generator[Part]:
    """All parts in order. Raises what a process raises, and `RunError` where one ends before its work."""
    if count < 2:
        yield from steps(0, 1)
        return
    crew: list[tuple[Any, Connection]] = []
    said: set[str] = set()
    gc.freeze()  # a collection in a fork would copy the memory that it shares
    try:
        try:
            for number in range(count):
                crew.append(_started(steps, number, count, [reader for _, reader in crew]))
        except OSError as error:
            _log.warning("one process prepares the rows: %s", error)
            yield from steps(0, 1)
            return
        for process, reader in cycle(crew):
            try:
                if not reader.poll(SILENT_S):
                    raise RunError(f"a process that prepares rows was silent for {SILENT_S:.0f} s; start again")
                part, failure, logged = pickle.loads(reader.recv_bytes())
            except (EOFError, OSError) as error:  # the second: in the middle of a part
                process.join()
                killed = "signal 9, often for want of memory" if process.exitcode == -9 else f"code {process.exitcode}"
                raise RunError(f"a process that prepares rows ended early ({killed}); start again") from error
            for name, level, message in logged:
                if message not in said:
                    said.add(message)
                    logging.getLogger(name).log(level, "%s", message)
            if failure is not None:
                raise failure
            if part is None:
                return
            yield part
    finally:
        gc.unfreeze()
        for process, reader in crew:
            process.kill()
            reader.close()
            process.join()


def _started(steps: Steps[Any], number: int, count: int, others: list[Connection]) -> tuple[Any, Connection]:
    reader, writer = multiprocessing.Pipe(duplex=False)
    with suppress(OSError):
        fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, HELD)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(steps, number, count, writer, [*others, reader]), daemon=True
    )
    process.start()
    writer.close()
    return process, reader


def _work(steps: Steps[Any], number: int, count: int, writer: Connection, readers: list[Connection]) -> None:
    """A process: its parts, and None behind them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for reader in readers:
        reader.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    logged = _Kept()
    logging.getLogger().handlers = [logged]
    failure: UserError | None = None
    with suppress(BrokenPipeError):  # the reader has ended
        try:
            for part in steps(number, count):
                writer.send_bytes(pickle.dumps((part, None, logged.taken()), protocol=5))
        except UserError as error:
            failure = error
        writer.send_bytes(pickle.dumps((None, failure, logged.taken()), protocol=5))


class _Kept(logging.Handler):
    """Lines that are told by the reader, once, however many processes log them."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append((record.name, record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[str, int, str]]:
        """Lines since the last call."""
        lines, self._lines = self._lines, []
        return lines
