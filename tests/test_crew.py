"""Work that processes share: in order, and nothing is left behind, however it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from whet.errors import DataError, RunError
from whet.training import crew
from whet.training.crew import cores, in_turns

PARTS = 50


def squares(first: int, step: int) -> Iterator[tuple[int, int]]:
    """Each with the process that made it."""
    for number in islice(range(PARTS), first, None, step):
        yield number**2, os.getpid()


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("count", [1, 2, 3, PARTS + 3])
def test_parts_arrive_in_order_from_all_processes(count: int) -> None:
    parts = list(in_turns(squares, count))
    assert [square for square, _ in parts] == [number**2 for number in range(PARTS)]
    pids = {pid for _, pid in parts}
    assert len(pids) == min(count, PARTS) and (os.getpid() in pids) is (count == 1)
    assert all(map(gone, pids - {os.getpid()}))


def test_a_failure_stands_where_it_is_in_the_order() -> None:
    def failing(first: int, step: int) -> Iterator[int]:
        for number in islice(range(PARTS), first, None, step):
            if number == 7:
                raise DataError("row 7: is bad; mend it")
            yield number

    reader = in_turns(failing, 3)
    assert list(islice(reader, 7)) == list(range(7))
    with pytest.raises(DataError, match="row 7: is bad; mend it"):
        next(reader)


def test_who_stops_reading_leaves_no_process() -> None:
    reader = in_turns(squares, 2)
    pids = {next(reader)[1], next(reader)[1]}
    reader.close()
    assert len(pids) == 2 and all(map(gone, pids))


def test_a_killed_process_is_said() -> None:
    def dying(first: int, step: int) -> Iterator[int]:
        for number in islice(range(PARTS), first, None, step):
            if number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number

    with pytest.raises(RunError, match=r"ended early \(signal 9, often for want of memory\); start again"):
        list(in_turns(dying, 2))


def test_nor_is_it_a_puzzle_that_one_was_killed_in_the_middle_of_a_part() -> None:
    def dying(first: int, step: int) -> Iterator[bytes]:
        if first == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            yield bytes(4 * crew.HELD)
        time.sleep(1)
        yield b""

    with pytest.raises(RunError, match=r"ended early \(code -14\); start again"):
        list(in_turns(dying, 2))


def test_what_cannot_be_shared_is_done_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fork, left = os.fork, [1]

    def refused() -> int:
        if not left:
            raise OSError(11, "Resource temporarily unavailable")
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    parts = list(in_turns(squares, 3))
    assert parts == [(number**2, os.getpid()) for number in range(PARTS)]
    assert "one process prepares the rows: [Errno 11]" in caplog.text


def test_it_is_the_reader_who_is_asked_to_stop() -> None:
    def large(first: int, step: int) -> Iterator[tuple[int, bytes]]:
        for _ in range(5):
            yield os.getpid(), bytes(2 * crew.HELD)  # more than a pipe holds: it waits for the reader

    reader = in_turns(large, 2)
    os.kill(next(reader)[0], signal.SIGINT)
    assert len(list(reader)) == 9


def test_a_silent_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(first: int, step: int) -> Iterator[int]:
        yield 0
        time.sleep(60)

    started, begun = crew._started, []
    monkeypatch.setattr(crew, "_started", lambda *given: begun.append(started(*given)) or begun[-1])
    monkeypatch.setattr(crew, "SILENT_S", 0.2)
    with pytest.raises(RunError, match="silent for 0 s"):
        list(in_turns(stuck, 2))
    assert [process.exitcode for process, _ in begun] == [-signal.SIGKILL] * 2, "it does not sleep on"


def test_what_all_log_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def telling(first: int, step: int) -> Iterator[int]:
        for number in islice(range(PARTS), first, None, step):
            logging.getLogger("whet.of").warning("the template is %s", "uneven")
            yield number

    list(in_turns(telling, 3))
    assert [(each.name, each.getMessage()) for each in caplog.records] == [("whet.of", "the template is uneven")]


def test_nothing_is_forked_beside_other_threads() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(cores()))
    thread.start()
    thread.join()
    assert found == [1]


READER = """
import os, sys, time
from whet.training.crew import in_turns
def slowly(first, step):
    while True:
        yield os.getpid()
        time.sleep(0.05)
for number, pid in enumerate(in_turns(slowly, 2)):
    if number < 2:
        print(pid, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_reader(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as reader:
        assert reader.stdout and reader.stderr
        pids = [int(reader.stdout.readline()) for _ in range(2)]
        if how is signal.SIGINT:
            os.killpg(reader.pid, how)  # as a terminal does
        else:
            reader.send_signal(how)
        assert all(map(gone, pids))
        assert reader.stderr.read().count("Traceback") == (how is signal.SIGINT), "the reader's own"
