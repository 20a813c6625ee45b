"""Laws of the sandbox for programs: what attacks does not come through, how each ends is told, and nothing is left."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.attacks import ENDLESS, FORKING, GOT, INTRUDERS
from whet.errors import SandboxError
from whet.sandbox import programs
from whet.sandbox.base import Limits, ProgramOutcome, Status
from whet.sandbox.canaries import MEANT
from whet.sandbox.http import HTTPSandbox
from whet.sandbox.programs import LocalSandbox

SHORT = Limits(deadline_s=0.7, memory_mb=512, file_mb=4)
LONG = Limits(deadline_s=20, memory_mb=256, file_mb=4)


def made(profile: str) -> LocalSandbox:
    """The sandbox; skips where this machine has none of that profile."""
    try:
        return LocalSandbox(profile, workers=2)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["strong", "default"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    with_profile = made(request.param)
    yield with_profile
    with_profile.close()


@pytest.fixture(scope="module")
def agentic() -> Iterator[LocalSandbox]:
    tools = made("agentic")
    yield tools
    tools.close()


def run(box: Any, program: str, **given: Any) -> ProgramOutcome:
    outcome: ProgramOutcome = asyncio.run(box.run(program, **given))
    return outcome


def jailed() -> set[int]:
    """The processes of all sandboxes, by their command lines."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"whet.sandbox.jail" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            pass
    return found


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[bytes]:
    """What an intruder is told of this process, which it may not reach."""
    os.chmod(tmp_path, 0o777)
    (tmp_path / "secret").write_text("the word")
    os.chmod(tmp_path / "secret", 0o666)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        told = {"secret": str(tmp_path / "secret"), "folder": str(tmp_path), "target": str(tmp_path / "target")}
        yield json.dumps(
            {**told, "unix": str(tmp_path / "socket"), "port": server.getsockname()[1], "pid": os.getpid()}
        ).encode()


def test_intruders_get_nothing(sandbox: LocalSandbox, facts: bytes, tmp_path: Path) -> None:
    for name, attack in {**INTRUDERS, **FORKING}.items():
        outcome = run(sandbox, GOT + attack, stdin=facts, limits=LONG)
        assert "got" not in outcome.stdout, (name, outcome)
        assert outcome.status in (Status.EXITED, Status.FINISHED, Status.SIGNALLED), (name, outcome)
    assert (tmp_path / "secret").read_text() == "the word"
    assert not (tmp_path / "target").exists()
    assert run(sandbox, "print(6 * 7)").stdout == "42\n"


def test_tools_get_processes_and_nothing_else(agentic: LocalSandbox, facts: bytes, tmp_path: Path) -> None:
    for name, attack in INTRUDERS.items():
        outcome = run(agentic, GOT + attack, stdin=facts, limits=LONG)
        assert "got" not in outcome.stdout, (name, outcome)
    for name, attack in FORKING.items():
        assert "got" in run(agentic, GOT + attack, stdin=facts, limits=LONG).stdout, name
    assert (tmp_path / "secret").read_text() == "the word"


@pytest.mark.parametrize("name", ENDLESS)
def test_every_end_has_its_name_and_leaves_nothing(sandbox: LocalSandbox, name: str) -> None:
    program, allowed = ENDLESS[name]
    outcome = run(sandbox, program, limits=SHORT if "timeout" in allowed else LONG)
    assert outcome.status in allowed.split(), outcome
    assert len(outcome.stdout) <= (SHORT.output_kb << 10) + (1 << 17)
    assert run(sandbox, "print(6 * 7)").stdout == "42\n"


def test_calls_of_another_architecture_end_it(sandbox: LocalSandbox) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("needs x86_64")
    code = (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid of i386); int 0x80; ret
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint('got', f())"
    )
    outcome = run(sandbox, code)
    assert (outcome.status, outcome.stdout) == (Status.SIGNALLED, "")


BOMB = """
import os, time
def bomb():
    while True:
        try:
            if os.fork() == 0:
                os.setsid()
        except OSError:
            time.sleep(0.01)
bomb()
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(0.1)
    os._exit(0)
os.wait()
print("done")
"""


def test_no_process_outlives_its_program(agentic: LocalSandbox) -> None:
    before = jailed()
    assert run(agentic, DAEMON).stdout == "done\n"
    assert run(agentic, BOMB, limits=SHORT).status in (Status.TIMEOUT, Status.MEMORY)
    deadline = time.monotonic() + 20
    while jailed() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not jailed() - before


def test_where_memory_runs_out_a_program_dies_before_its_trainer(agentic: LocalSandbox) -> None:
    score = "path = '/proc/self/oom_score_adj'\nprint(open(path).read().strip())\nopen(path, 'w').write('0')"
    outcome = run(agentic, score)
    assert (outcome.stdout, outcome.status) == ("1000\n", Status.EXITED)


def test_the_memory_of_all_processes_together_is_limited(agentic: LocalSandbox) -> None:
    hoard = "import os, time\nfor _ in range(8):\n if os.fork() == 0: break\nx = b'x' * (100 << 20)\ntime.sleep(60)"
    assert run(agentic, hoard, limits=Limits(deadline_s=30, memory_mb=256)).status is Status.MEMORY


def test_files_lie_in_the_working_folder_of_one_program(sandbox: LocalSandbox) -> None:
    listing = "import os; print(sorted(os.listdir('.')), open('deep/b.bin', 'rb').read())\nimport a; print(a.x)"
    found = run(sandbox, listing, files={"a.py": b"x = 7", "deep/b.bin": b"\x00\xff"})
    assert found.stdout == "['a.py', 'deep'] b'\\x00\\xff'\n7\n"
    for name in ("../x", "/tmp/x", "a/../../x"):
        with pytest.raises(ValueError, match="leads out"):
            run(sandbox, "pass", files={name: b""})
    again = run(sandbox, "import os; print('a.py' in os.listdir('.'))", files={"c": b""})
    assert again.stdout == "False\n"


def test_exit_codes_are_pythons(sandbox: LocalSandbox) -> None:
    ends = {"pass": 0, "raise SystemExit": 0, "import sys; sys.exit(3)": 3, "exit('no')": 1, "1/0": 1, "quit()": 0}
    assert {program: run(sandbox, program).exit_code for program in ends} == ends
    raised = run(sandbox, "def f():\n  1/0\nf()")
    assert raised.stderr.splitlines()[1] == '  File "program.py", line 3, in <module>'
    late = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"
    assert run(sandbox, late).stdout == "late\n"
    assert run(sandbox, "print(input()[::-1])", stdin=b"abc\n").stdout == "cba\n"


OPEN = """
import os, time
def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False
time.sleep(0.3)
print(input(), [fd for fd in range(3, 1024) if is_open(fd)])
"""


def test_many_at_once_each_have_their_own_outcome_and_descriptors(sandbox: LocalSandbox) -> None:
    async def everyone(box: LocalSandbox) -> list[ProgramOutcome]:
        return await asyncio.gather(*(box.run(OPEN, stdin=b"%d\n" % i, limits=LONG) for i in range(60)))

    descriptors = len(os.listdir("/proc/self/fd"))
    crowd = LocalSandbox(sandbox.profile, workers=60)
    try:
        assert [outcome.stdout for outcome in asyncio.run(everyone(crowd))] == [f"{i} []\n" for i in range(60)]
    finally:
        crowd.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_a_program_starts_is_counted_for_it_alone(sandbox: LocalSandbox, agentic: LocalSandbox) -> None:
    """The limit of processes holds for threads too: programs beside it may not use up a program's own."""
    few = Limits(deadline_s=20, processes=4)
    thread = (
        "import threading, time\ntime.sleep(0.5)\nt = threading.Thread(target=print, args=('ok',))\nt.start(); t.join()"
    )
    child = "import os, time\ntime.sleep(0.5)\nif os.fork() == 0:\n print('ok', flush=True); os._exit(0)\nos.wait()"

    async def everyone(box: LocalSandbox, program: str) -> list[ProgramOutcome]:
        return await asyncio.gather(*(box.run(program, limits=few) for _ in range(8)))

    for profile, program in ((sandbox.profile, thread), (agentic.profile, child)):
        crowd = LocalSandbox(profile, workers=8)
        try:
            assert [outcome.stdout for outcome in asyncio.run(everyone(crowd, program))] == ["ok\n"] * 8, profile
        finally:
            crowd.close()
    if sandbox.profile == "strong":
        many = "import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(9,)).start()"
        assert "can't start new thread" in run(sandbox, many, limits=few).stderr


def test_a_session_keeps_its_state_and_ends_with_it(agentic: LocalSandbox) -> None:
    console = "import sys\nspace = {}\nfor line in sys.stdin:\n print(eval(line, space), flush=True)"

    async def talk() -> list[ProgramOutcome]:
        session = await agentic.open(console)
        said = [await session.ask(line) for line in ("[x := 6][0]", "x * 7", "__import__('os').getpid()")]
        said.append(await session.ask("exec('while 1: pass')", deadline_s=0.3))
        said.append(await session.ask("x"))
        await session.close()
        return said

    first, second, third, late, gone = asyncio.run(talk())
    assert (first.stdout, second.stdout, third.stdout) == ("6\n", "42\n", "1\n")
    assert late.status is Status.TIMEOUT and gone.status is not Status.FINISHED


def test_a_session_reads_and_writes_at_once(sandbox: LocalSandbox) -> None:
    """A line longer than what a socket holds goes to a program that first writes more than a pipe holds."""
    program = "import sys\nsys.stderr.write('x' * 300000)\nfor line in sys.stdin: print(len(line), flush=True)"

    async def talk() -> list[ProgramOutcome]:
        session = await sandbox.open(program, limits=LONG)
        said = [await session.ask("y" * 900_000), await session.ask("z")]
        await session.close()
        return [*said, await session.ask("closed")]

    first, second, closed = asyncio.run(talk())
    assert (first.stdout, len(first.stderr), second.stdout) == ("900001\n", 300_000, "2\n")
    assert closed.status is Status.MACHINERY


def test_a_reply_in_time_is_one_however_late_it_is_read(sandbox: LocalSandbox) -> None:
    program = "import time\nprint('a', flush=True)\ntime.sleep(0.2)\nprint('b' * 50000, flush=True)\ntime.sleep(60)"

    async def talk() -> ProgramOutcome:
        session = await sandbox.open(program, limits=LONG)
        await session.ask("")
        await asyncio.sleep(2)
        said = await session.ask("", deadline_s=1e-9)
        await session.close()
        return said

    assert len(asyncio.run(talk()).stdout) == 50001


def test_waiting_for_a_turn_is_no_time_of_a_programs_own(sandbox: LocalSandbox) -> None:
    console = "import sys, time\nfor line in sys.stdin: print(eval(line), flush=True)"

    async def talk() -> list[ProgramOutcome]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        sessions = [await sandbox.open(console, limits=LONG) for _ in range(2)]
        for session in sessions:
            await session.ask("1")
        said = [*await asyncio.gather(sessions[0].ask("time.sleep(2)"), sessions[1].ask("6 * 7"))]
        for session in sessions:
            await session.close()
        return said

    slow, quick = asyncio.run(talk())
    assert (slow.stdout, quick.stdout) == ("None\n", "42\n")
    assert quick.wall_s < 2 <= slow.wall_s


def test_a_session_may_be_closed_while_it_is_asked(sandbox: LocalSandbox) -> None:
    async def talk() -> ProgramOutcome:
        session = await sandbox.open("import time\ntime.sleep(60)", limits=Limits(deadline_s=50))
        asked = asyncio.create_task(session.ask(""))
        await asyncio.sleep(0.5)
        await session.close()
        return await asked

    descriptors, begun = len(os.listdir("/proc/self/fd")), time.monotonic()
    assert asyncio.run(talk()).status is Status.MACHINERY
    assert time.monotonic() - begun < 40 and len(os.listdir("/proc/self/fd")) == descriptors


def test_without_descriptors_nothing_is_known_and_none_is_lost(sandbox: LocalSandbox) -> None:
    async def ask() -> ProgramOutcome:
        session = await sandbox.open("input(); print('ok')", limits=LONG)
        said = await session.ask("")
        await session.close()
        return said

    assert asyncio.run(ask()).stdout == "ok\n"
    held, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    talked = set()
    for room in range(4, 14):  # an event loop has some of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + room, limits[1]))
        try:
            first = sandbox.run_now("print('ok')", {}, b"", LONG)
            with suppress(OSError):
                talked.add(asyncio.run(ask()).status)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert first.status is Status.MACHINERY or first.stdout == "ok\n", first
    assert Status.MACHINERY in talked
    assert len(os.listdir("/proc/self/fd")) == held
    assert run(sandbox, "print('ok')").stdout == "ok\n"


def test_a_dead_template_is_no_programs_fault(sandbox: LocalSandbox) -> None:
    """A program that is under way when the machinery dies is run again, and the next ones find a new template."""
    template = sandbox._template._warm.process
    assert template is not None
    killer = threading.Timer(0.3, template.kill)
    killer.start()
    outcome = run(sandbox, "import time; time.sleep(1); print('ok')")
    killer.join()
    assert (outcome.status, outcome.stdout) == (Status.FINISHED, "ok\n")
    assert run(sandbox, "print(1)").stdout == "1\n"


def test_who_breaks_the_sandbox_twice_is_told_from_a_broken_sandbox() -> None:
    lost, fine = ProgramOutcome(status=Status.MACHINERY), ProgramOutcome(status=Status.FINISHED, stdout="ok\n")
    assert programs.settle(fine, lambda: lost, lambda: lost) is fine
    assert programs.settle(lost, lambda: fine, lambda: lost) is fine
    assert programs.settle(lost, lambda: lost, lambda: fine).status is Status.BROKE
    assert programs.settle(lost, lambda: lost, lambda: lost).status is Status.MACHINERY


def test_minimal_is_had_by_name_alone_and_says_what_it_does_not_stop() -> None:
    box = LocalSandbox("minimal")
    try:
        killing = "import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(5)"
        assert "not stopped: reading files, writing files, reaching the network" in box.describe()
        assert run(box, killing).status in (Status.BROKE, Status.SIGNALLED)
        assert run(box, "print(1)").stdout == "1\n"
    finally:
        box.close()


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides is what the attacks got, whatever the layers say of themselves."""
    monkeypatch.setattr(programs, "try_out", lambda run: {"reading files": False, "reaching the network": True})
    with pytest.raises(SandboxError, match=r"strong: nothing keeps programs from reading files; default: .*minimal"):
        LocalSandbox("auto")
    monkeypatch.setitem(MEANT, "strong", ["reading files"])
    LocalSandbox("auto").close()


def test_nothing_is_left_when_the_trainer_dies(tmp_path: Path) -> None:
    before = jailed()
    code = (
        "import asyncio, os, threading; from whet.sandbox.programs import LocalSandbox; box = LocalSandbox('auto')\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), 9)).start()\nasyncio.run(box.run('while True: pass'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    if b"SandboxError" in done.stderr:
        pytest.skip("no sandbox here")
    deadline = time.monotonic() + 20
    while jailed() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done.returncode == -9 and not jailed() - before


class _Fusion(BaseHTTPRequestHandler):
    """Enough of SandboxFusion: it runs the program as it is."""

    fail: ClassVar[dict[str, int]] = {}

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.answer(asked)
        if self.fail.get("left", 0) > 0 and "import ctypes" not in asked["code"]:
            self.fail["left"] -= 1
            answer = {"status": "SandboxError", "message": "no worker", "run_result": None}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
        text = {name: base64.b64decode(content).decode() for name, content in asked["files"].items()}
        code = f"files = {text!r}\n{asked['code']}"
        try:
            done = subprocess.run(
                [sys.executable, "-ISc", code],
                input=asked["stdin"],
                capture_output=True,
                text=True,
                timeout=asked["run_timeout"],
            )
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}}
        result = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        return {"status": "Success" if done.returncode == 0 else "Failed", "message": "", "run_result": result}

    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture
def fusion() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Fusion)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_of_sandboxfusion_is_a_sandbox(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    box = HTTPSandbox(fusion)
    try:
        assert run(box, "print(input(), files)", stdin=b"hi", files={"a": b"b"}).stdout == "hi {'a': 'b'}\n"
        assert run(box, "1/0").status is Status.EXITED
        assert run(box, "while True: pass", limits=Limits(deadline_s=0.5)).status is Status.TIMEOUT
        assert run(box, "print('x' * 5000)", limits=Limits(output_kb=1)).status is Status.OUTPUT
        monkeypatch.setitem(_Fusion.fail, "left", 1)
        assert run(box, "print(1)").stdout == "1\n"  # tried again
        monkeypatch.setitem(_Fusion.fail, "left", 3)
        assert run(box, "print(1)") == ProgramOutcome(status=Status.MACHINERY, note="no worker")
        with pytest.raises(SandboxError, match="no sessions"):
            asyncio.run(box.open("pass"))
    finally:
        box.close()
    with pytest.raises(SandboxError, match=r"127.0.0.1:1: .*start the server"):
        HTTPSandbox("http://127.0.0.1:1")
