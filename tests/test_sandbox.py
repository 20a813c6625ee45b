"""Laws of the worker pool: whatever the code over there does, every payload gets a typed result and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from whet.sandbox.base import JSON, FailureKind, Result
from whet.sandbox.frames import LIMIT, encode, take
from whet.sandbox.workers import WorkerPool

BEHAVIOUR = """
import os, signal, subprocess, sys, time

def load(greeting="", seconds=0.0):
    time.sleep(seconds)
    served = []

    def answer(payload):
        served.append(payload)
        match payload:
            case "hang": time.sleep(1000)
            case "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)
            case "c": return len(str(9**9**9))
            case "die": print("last words"); os._exit(7)
            case "segv": os.kill(os.getpid(), signal.SIGSEGV)
            case "exit": sys.exit(0)
            case "raise": raise ValueError("first\\nsecond \\x1b[31m")
            case "print":
                for _ in range(50): print("x" * 100_000)
            case "set": return {1}
            case "child": subprocess.Popen(["sleep", "1000"]); time.sleep(1000)
            case "garbage": os.write(channel(), b"\\xff" * 64)
            case "memory": return len(bytearray(8 << 30))
            case "pid": return os.getpid()
            case "served": return len(served)
            case "fork": os.fork()
            case "first to die": return open("/proc/self/oom_score_adj").read().strip()
            case ["orphan", mark] if os.path.exists(mark): return "spared"
            case ["orphan" | "patricide", *mark]:
                for file in mark: open(file, "x").close()
                keeper = open(f"/proc/{os.getppid()}/stat").read()
                os.kill(int(keeper.rpartition(")")[2].split()[1]), signal.SIGKILL); time.sleep(1000)
            case "parent": os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)
            case "daemon":
                if os.fork() == 0: os.setsid(); payload = "its parent"
                if payload == "daemon": return os.getpid()
                time.sleep(1000)
            case "group": os.killpg(0, signal.SIGINT); os.killpg(0, signal.SIGTERM)
        return f"{greeting}{payload}"

    return answer

def channel():
    folder = "/proc/self/fd/"
    return next(int(fd) for fd in os.listdir(folder) if "socket" in os.path.realpath(folder + fd))

def broken():
    raise RuntimeError("no licence")
"""


@pytest.fixture
def behaviour(tmp_path: Path) -> str:
    file = tmp_path / "behaviour.py"
    file.write_text(BEHAVIOUR)
    return f"{file}:load"


@pytest.fixture
def pool(behaviour: str) -> Iterator[WorkerPool]:
    with WorkerPool(behaviour, deadline_s=1.5, workers=2, memory_mb=4096) as made:
        yield made


def kind(result: Result) -> FailureKind | None:
    return result.failure.kind if result.failure else None


def message(result: Result) -> str:
    assert result.failure is not None
    return result.failure.message


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    listed = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(line.split()[0]) for line in listed.stdout.splitlines() if line.split()[1] != "ps"}


def alive(pid: int) -> bool:
    """Running: a zombie that its adopter has yet to bury is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(1500):
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("value", [None, True, 3, 0.1, "é\ud800\x00", [1, [2]], {"a": {"b": None}}])
def test_values_come_back_as_they_were_sent(value: JSON) -> None:
    frame = bytearray(encode({"value": value}) + b"\x00")
    assert take(frame) == {"value": value} and frame == b"\x00"


def test_a_frame_is_taken_when_it_is_whole_and_garbage_is_refused() -> None:
    whole = encode({"value": "x" * 100})
    for cut in (0, 3, 4, len(whole) - 1):
        assert take(bytearray(whole[:cut])) is None
    for garbage in ((LIMIT + 1).to_bytes(4, "big"), b"\x00\x00\x00\x011", b"\x00\x00\x00\x01{"):
        with pytest.raises(ValueError, match=r"."):
            take(bytearray(garbage))
    with pytest.raises(ValueError, match="not a frame"):
        take(bytearray((100_000).to_bytes(4, "big") + b"[" * 100_000))


def test_every_payload_gets_its_own_result_in_order(pool: WorkerPool) -> None:
    payloads = ["a", "hang", "exit", "raise", "die", "segv", "set", "print", "deaf", "c", "memory", "garbage", "b"]
    results = pool.map(payloads)
    expected = dict.fromkeys(("hang", "deaf", "c"), FailureKind.TIMEOUT)
    expected |= dict.fromkeys(("exit", "raise", "set", "memory"), FailureKind.RAISED)
    expected |= dict.fromkeys(("die", "segv", "garbage"), FailureKind.CRASH)
    assert [kind(result) for result in results] == [expected.get(payload) for payload in payloads]
    assert [result.value for result in results if result.failure is None] == ["a", "print", "b"]
    said = dict(zip(payloads, results, strict=True))
    assert message(said["raise"]) == "ValueError: first second ?[31m (behaviour.py:17)"
    assert message(said["die"]) == "the worker exited with code 7; it last printed: last words"
    assert message(said["segv"]) == "the worker was killed by signal 11"
    assert message(said["hang"]) == "did not answer within 1.5 s and was killed"
    assert message(said["exit"]).startswith("SystemExit: 0")


def test_a_copy_that_the_code_forked_does_not_answer_too(behaviour: str) -> None:
    with WorkerPool(behaviour, deadline_s=1.5, workers=1) as pool:
        for _ in range(5):
            assert [result.value for result in pool.map(["fork", "a", "fork", "b"])] == ["fork", "a", "fork", "b"]


def test_a_worker_that_leaks_dies_before_the_run_does(pool: WorkerPool) -> None:
    """Where the machine's memory ends, the kernel takes the process with the highest score."""
    assert [result.value for result in pool.map(["first to die"])] == ["1000"]


def test_killing_leaves_no_process_no_zombie_and_no_descriptor(behaviour: str) -> None:
    threading.Thread(target=lambda: None).start()
    before, family = fds(), children()
    with WorkerPool(behaviour, deadline_s=0.2, workers=2) as pool:
        pool.map(["hang", "die", "child", "a"])
        steady = fds()
        for _ in range(2):
            pool.map(["hang", "die", "a", "a"])
        assert fds() <= steady + 4, "each of the two workers costs two descriptors, however many were killed"
        assert len(children() - family) <= 2
    assert eventually(lambda: fds() == before) and eventually(lambda: children() == family)


def test_what_a_worker_started_dies_with_it(behaviour: str, tmp_path: Path) -> None:
    file = tmp_path / "starter.py"
    file.write_text(
        "import subprocess, time\n"
        "def load(note):\n"
        "    def answer(payload):\n"
        "        open(note, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))\n"
        "        time.sleep(1000)\n"
        "    return answer\n"
    )
    note = tmp_path / "pid"
    with WorkerPool(f"{file}:load", arguments=[str(note)], deadline_s=0.5) as pool:
        assert kind(pool.map([1])[0]) is FailureKind.TIMEOUT
    assert eventually(lambda: not alive(int(note.read_text())))


# -------------------------------------------------------------------------------------------- forked workers


@pytest.fixture
def forked(behaviour: str) -> Iterator[WorkerPool]:
    with WorkerPool(behaviour, deadline_s=1.5, workers=2, memory_mb=4096, forked=True) as made:
        yield made


def test_forked_workers_answer_and_fail_as_others_do(forked: WorkerPool) -> None:
    payloads = ["a", "hang", "die", "raise", "exit", "memory", "segv", "garbage", "print", "b"]
    results = forked.map(payloads)
    expected = {"hang": FailureKind.TIMEOUT}
    expected |= dict.fromkeys(("exit", "raise", "memory"), FailureKind.RAISED)
    expected |= dict.fromkeys(("die", "segv", "garbage"), FailureKind.CRASH)
    assert [kind(result) for result in results] == [expected.get(payload) for payload in payloads]
    assert message(results[2]) == "the worker died; it last printed: last words"


def test_a_target_is_loaded_once_however_many_workers_are_killed(tmp_path: Path) -> None:
    file = tmp_path / "counting.py"
    file.write_text(
        "import os\n"
        "def load(note):\n"
        "    open(note, 'a').write('loaded ')\n"
        "    return lambda payload: os._exit(1) if payload == 'die' else payload\n"
    )
    note = tmp_path / "note"
    with WorkerPool(f"{file}:load", arguments=[str(note)], deadline_s=5, forked=True) as pool:
        results = pool.map(["die", 1, "die", "die", 2])
    assert [result.value for result in results] == [None, 1, None, None, 2] and note.read_text() == "loaded "


def test_long_payloads_do_not_hold_up_the_others(behaviour: str) -> None:
    """Both workers hang; what waits behind them is answered before they are killed."""
    with WorkerPool(behaviour, deadline_s=2.5, workers=2, forked=True) as pool:
        results = pool.map(["hang", "hang", *["a"] * 20])
        assert len(pool._idle) <= 2, "the further ones are gone"
    assert [kind(result) for result in results] == [FailureKind.TIMEOUT] * 2 + [None] * 20


def test_a_killed_template_is_started_again(forked: WorkerPool) -> None:
    assert forked.map(["a"])[0].value == "a"
    assert forked._template is not None and forked._template.process is not None
    os.kill(forked._template.process.pid, signal.SIGKILL)
    assert eventually(lambda: not alive(forked._template.process.pid))  # type: ignore[union-attr]
    results = forked.map(["b", "d"])
    assert [result.value for result in results] == ["b", "d"], ("its workers died with it", results)


def test_a_job_is_not_blamed_for_the_death_of_its_template(forked: WorkerPool, tmp_path: Path) -> None:
    results = forked.map(["a", ["orphan", str(tmp_path / "mark")], "b"])
    assert [result.value for result in results] == ["a", "spared", "b"]
    (killed,) = forked.map([["patricide"]])
    assert killed.failure is not None and killed.failure.kind is FailureKind.CRASH, "it does so each time"
    assert forked.map(["a"])[0].value == "a"


def test_a_forked_worker_that_kills_its_parent_kills_no_other(forked: WorkerPool) -> None:
    template = forked.map(["a"]) and forked._template and forked._template.process
    results = forked.map(["b", "parent", "d", "parent", "e", "parent", "f"])
    assert [kind(result) for result in results] == [None, FailureKind.CRASH] * 3 + [None]
    assert template is not None and template.poll() is None


def test_what_a_forked_worker_started_in_a_session_of_its_own_ends_with_it(behaviour: str) -> None:
    def copies() -> int:
        named = (file for file in Path("/proc").glob("[0-9]*/cmdline"))
        return sum(behaviour.encode() in content(file) for file in named)

    def content(file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError:
            return b""

    with WorkerPool(behaviour, deadline_s=5, forked=True) as pool:
        pool.map(["daemon"])
        alone = 1 + 2 + 1  # the template, the worker with its keeper, the daemon
        assert eventually(lambda: copies() == alone)
        pool.map(["die"])
        assert eventually(lambda: copies() == 1)


def test_forked_workers_leave_nothing_behind(behaviour: str) -> None:
    threading.Thread(target=lambda: None).start()
    before, family = fds(), children()
    with WorkerPool(behaviour, deadline_s=0.3, workers=2, forked=True) as pool:
        pids = [result.value for result in pool.map(["pid", "pid"])]
        for _ in range(3):
            pool.map(["hang", "die", "child", "a"])
        assert fds() <= before + 2 * 2 + 2, "two for each worker, and the template's"
    assert eventually(lambda: fds() == before) and eventually(lambda: children() == family)
    assert eventually(lambda: not any(alive(pid) for pid in pids if isinstance(pid, int)))


def test_what_cannot_be_loaded_is_said_by_the_template_too(behaviour: str) -> None:
    with WorkerPool(behaviour.removesuffix("load") + "broken", deadline_s=1, forked=True) as pool:
        assert message(pool.map([1])[0]) == "RuntimeError: no licence (behaviour.py:48)"
    with WorkerPool(behaviour, arguments=["", 1000], deadline_s=0.2, startup_s=0.3, forked=True) as pool:
        results = pool.map(["x", "y"])
    assert [kind(result) for result in results] == [FailureKind.START] * 2
    assert "did not start within 0.3 s" in message(results[0])


def test_starting_has_an_allowance_of_its_own(behaviour: str) -> None:
    with WorkerPool(behaviour, arguments=["hi ", 1.2], deadline_s=1) as pool:
        assert pool.map(["x"]) == [Result(value="hi x")]
    with WorkerPool(behaviour, arguments=["", 1000], deadline_s=0.2, startup_s=0.3) as pool:
        results = pool.map(["x", "y", "z"])
        assert [kind(result) for result in results] == [FailureKind.START] * 3
        assert "did not start within 0.3 s" in message(results[0])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("behaviour.py:loading", "has no function 'loading'; did you mean 'load'?"),
        ("behavior.py:load", "behavior.py does not exist; did you mean behaviour.py?"),
        ("behaviour.py:broken", "RuntimeError: no licence (behaviour.py:48)"),
        ("no_such_module:load", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("load", "must be file.py:function"),
    ],
)
def test_code_that_cannot_be_loaded_is_said_once_with_a_near_name(behaviour: str, target: str, words: str) -> None:
    where = str(Path(behaviour).parent / target) if ".py" in target else target
    with WorkerPool(where, deadline_s=1) as pool:
        results = pool.map([1, 2])
    assert [kind(result) for result in results] == [FailureKind.START] * 2
    assert words in message(results[0]) and "\n" not in message(results[0])


def test_a_payload_that_is_not_json_fails_alone(pool: WorkerPool) -> None:
    bad, good = pool.map([{1, 2}, "a"])  # type: ignore[list-item]
    assert kind(bad) is FailureKind.RAISED and good.value == "a"


def test_workers_are_kept_until_they_have_served_their_share(behaviour: str) -> None:
    with WorkerPool(behaviour, deadline_s=5, recycle_after=3) as pool:
        assert [pool.map(["served"])[0].value for _ in range(5)] == [1, 2, 3, 1, 2]


def test_a_worker_that_died_while_idle_costs_nobody_a_result(behaviour: str) -> None:
    with WorkerPool(behaviour, deadline_s=5) as pool:
        pid = pool.map(["pid"])[0].value
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not alive(pid))
        assert pool.map(["a"])[0].value == "a"


def test_signals_to_the_group_do_not_stop_grading(pool: WorkerPool) -> None:
    assert pool.map(["group"])[0].value == "group"


def test_any_thread_may_call_and_workers_outlive_the_thread(pool: WorkerPool) -> None:
    pids: list[object] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: pids.append(pool.map(["pid"])[0].value))
        thread.start()
        thread.join()
    assert pids[0] == pids[1] == pool.map(["pid"])[0].value, "the first thread's end did not kill its worker"
    answers: list[list[object]] = [[] for _ in range(4)]
    threads = [
        threading.Thread(
            target=lambda n=n: answers[n].extend(r.value for r in pool.map([f"{n}.{i}" for i in range(5)]))
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[f"{n}.{i}" for i in range(5)] for n in range(4)]


def test_closing_ends_a_running_call(behaviour: str) -> None:
    pool = WorkerPool(behaviour, deadline_s=1000)
    pool.map(["a"])
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.extend(pool.map(["hang", "hang"])))
    thread.start()
    time.sleep(0.1)
    pool.close()
    pool.close()
    thread.join(30)
    assert [kind(result) for result in results] == [FailureKind.CRASH] * 2


@pytest.mark.parametrize("payload", ["hang", "c"])
def test_workers_die_with_the_parent(behaviour: str, payload: str) -> None:
    code = (
        "import sys, threading\n"
        "from whet.sandbox.workers import WorkerPool\n"
        "pool = WorkerPool(sys.argv[1], deadline_s=1000)\n"
        "print(pool.map(['pid'])[0].value, flush=True)\n"
        "pool.map([sys.argv[2]])\n"
    )
    source = str(Path(sys.modules["whet"].__file__ or "").parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, behaviour, payload],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    time.sleep(0.1)  # let it sink into its payload
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not alive(worker))
