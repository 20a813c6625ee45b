"""Tools that ship: a Python interpreter, SQL and MCP servers, alone and beside a class; what they refuse."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from whet.config.environment import EnvironmentConfig
from whet.envs.base import Task
from whet.envs.tools.console import Capped, run
from whet.envs.tools.play import ToolEnvironments
from whet.envs.tools.sql import SQL
from whet.errors import ConfigError, EnvironmentFailure, PolicyFault
from whet.launch.environment import section_of, try_environment
from whet.records import Message, ToolCall

TABLES = {"t": {"columns": ["a", {"name": "b", "type": "INTEGER"}], "rows": [[1, 2], ["x", 4]]}}
ENDLESS = "with recursive r(n) as (select 1 union all select n + 1 from r)"
Said = tuple[list[str], dict[str, float]]


@contextmanager
def environment(**config: Any) -> Iterator[ToolEnvironments]:
    """Opened; skips where an interpreter has no sandbox on this machine."""
    try:
        made = ToolEnvironments(EnvironmentConfig.model_validate(config))
    except ConfigError as error:
        if "needs a sandbox" in str(error):
            pytest.skip(str(error))
        raise
    with closing(made):
        yield made


def played(made: ToolEnvironments, calls: Sequence[tuple[str, dict[str, Any]]], seed: int = 0, **row: Any) -> Said:
    """What each call was told, with its status where that is not ok; and what the play was worth."""

    async def one() -> Said:
        play, told = made.make(Task(id="t", messages=(Message(role="user", content="Go."),), columns=row)), []
        told.append((await play.start(seed=seed)).messages[-1].content)
        for name, arguments in calls:
            call = ToolCall(id="1", name=name, arguments=arguments)
            told.append(
                (await play.step(Message(role="assistant", content="", tool_calls=(call,)))).messages[0].content
            )
        return told, dict(await play.close())

    return asyncio.run(one())


# ------------------------------------------------------------------------------------------------- python


def python(*codes: str) -> list[tuple[str, dict[str, Any]]]:
    return [("python", {"code": code}) for code in codes]


def test_an_interpreter_keeps_its_variables_and_loses_them_with_its_life() -> None:
    with environment(kind="python", call_s=0.7, output_characters=200) as made:
        told, worth = played(
            made,
            python("x = 6", "x * 7", "print('a' * 250)", "1 / 0", "def f(:", "exit()", "input()", "x")
            + python("import os\nfor _ in range(3): os.fork()", "x + 1", "while 1: pass", "x", "os._exit(3)", "2"),
        )
        assert told[1:4] == ["(no output)", "42", "a" * 200 + "\n[... 51 characters left out]"]
        last = [text.rpartition("\n")[2] for text in told[4:]]
        assert last[:4] == ["ZeroDivisionError: division by zero", "SyntaxError: invalid syntax", "SystemExit",
                            "EOFError: EOF when reading a line"]  # fmt: skip
        assert last[4:7] == ["6", "(no output)", "7"], "copies that the code forked answer nothing"
        assert (
            last[7] == "error: RuntimeError: the interpreter did not answer within 0.7 s and was killed; "
            "its variables are lost"
        )
        assert last[8] == "NameError: name 'x' is not defined"
        assert last[9].startswith("NameError") and last[10] == "2" and worth == {}
        draws = [played(made, python("import random; random.random()"), seed)[0][1] for seed in (1, 1, 2)]
        assert draws[0] == draws[1] != draws[2], "they follow from the episode's seed"


def test_an_interpreter_is_in_the_sandbox(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("gold")
    attacks = [f"open({str(secret)!r}).read()", "import socket; socket.create_connection(('127.0.0.1', 22), 1)"]
    own = ["open('mine', 'w').write('q')", "import subprocess; subprocess.run(['cat', 'mine']).returncode"]
    with environment(kind="python", memory_mb=128) as made:
        told, _ = played(made, python(*attacks, "b = bytearray(10**9)", *own))
        assert [text.rpartition("\n")[2].partition(":")[0] for text in told[1:4]] == [
            "FileNotFoundError", "ConnectionRefusedError", "MemoryError",
        ]  # fmt: skip
        assert told[4:] == ["1", "0\nq"]
        assert played(made, python("open('mine')"))[0][1].endswith("No such file or directory: 'mine'")


def test_what_a_call_prints_and_gives() -> None:
    space: dict[str, Any] = {}
    printed = Capped(200)
    with redirect_stdout(printed):
        run("y = 2\nprint('a')\n(y, None)", space)
        run("None", space)
        run("raise KeyError('k')", space)
    assert printed.getvalue().startswith('a\n(2, None)\nTraceback (most recent call last):\n  File "call.py", line 1')
    assert printed.getvalue().endswith("KeyError: 'k'\n")


# ---------------------------------------------------------------------------------------------------- sql


def sql(*queries: str) -> list[tuple[str, dict[str, Any]]]:
    return [("sql", {"query": query}) for query in queries]


def test_sql_reads_the_row_s_tables_and_is_paid_for_the_gold_s_rows() -> None:
    with environment(kind="sql", rows=1) as made:
        told, worth = played(made, sql("select * from t", "select a from t order by 1 desc"), tables=TABLES,
                             gold_sql="select a from t")  # fmt: skip
        assert told[0] == 'Go.\n\nCREATE TABLE "t" ("a", "b" INTEGER)'
        assert told[1:] == ["a | b\n1 | 2\n[1 more rows]", "a\nx\n[1 more rows]"]
        assert worth == {"sql": 1.0}
        assert played(made, sql("select a from t limit 1"), tables=TABLES, gold_sql="select a from t")[1] == {"sql": 0}
        assert played(made, [], tables=TABLES, gold_sql="select a from t")[1] == {"sql": 0.0}
        assert played(made, sql("select a from t"), tables=TABLES)[1] == {}, "no gold, no opinion"
        ordered = played(made, sql("select b from t"), tables=TABLES, gold_sql="select b from t order by b desc")
        assert ordered[1] == {"sql": 0.0}


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("drop table t", "DatabaseError: not authorized"),
        ("attach 'x.db' as y", "DatabaseError: not authorized"),
        ("pragma writable_schema = 1", "DatabaseError: not authorized"),
        ("vacuum into 'x.db'", "DatabaseError: authorization denied"),
        ("select load_extension('x')", "OperationalError: not authorized to use function"),
        ("select a from t; select 1", "ProgrammingError: You can only execute one statement"),
        (f"{ENDLESS} select count(*) from r", "TimeoutError: the query took more than 0.2 s"),
        ("select zeroblob(1000000000)", "DataError: string or blob too big"),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_a_query_reaches_no_file_and_ends(query: str, told: str, write: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if write and query.startswith("drop"):
        return
    monkeypatch.chdir(tmp_path)
    SQL.load(None, write, 20, 0.2, True)
    play = SQL()
    play.reset(tables=TABLES)
    with pytest.raises((OSError, sqlite3.Error)) as caught:
        play.sql(query)
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(told)
    assert play.sql("select count(*) from t").startswith("count(*)\n2") and not list(tmp_path.iterdir())


def test_what_a_play_writes_is_its_own_and_compared_with_what_the_gold_leaves(tmp_path: Path) -> None:
    file = tmp_path / "d.sqlite"
    with closing(sqlite3.connect(file)) as made:
        made.executescript("create table t (a, b); insert into t values (1, 2), ('x', 4)")
    before = file.read_bytes()
    SQL.load(str(file), True, 20, 5.0, False)
    one, other = SQL(), SQL()
    for play in (one, other):
        assert play.reset(gold_sql="delete from t where a = 1") is None
    assert one.sql("delete from t where b = 2") == "done; 1 rows changed"
    assert (one.reward(), other.reward()) == ({"sql": 1.0}, {"sql": 0.0})
    with pytest.raises(sqlite3.OperationalError, match="full"):
        one.sql(f"{ENDLESS} insert into t select zeroblob(1000000), n from r")
    assert file.read_bytes() == before
    (tmp_path / "no.sqlite").write_text("no database")
    with pytest.raises(ConfigError, match=r"environment: .*no\.sqlite: no database of SQLite"):
        ToolEnvironments(EnvironmentConfig.model_validate({"kind": "sql", "database": tmp_path / "no.sqlite"}))


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt") as lines:
        yield from map(json.loads, lines)


def test_gold_queries_of_geoquery_score_1(shared_data: Path) -> None:
    folder = shared_data / "geoquery"
    SQL.load(str(folder / "shared" / "geography-db.sqlite"), False, 20, 5.0, True)
    scores: list[float] = []
    for row in rows_of(folder / "dev" / "geography.jsonl.gz"):
        query = row["sql"][0].rstrip(" ;")
        for name, value in row["sentences"][0]["variables"].items():
            query = query.replace(name, value)
        if (play := begun(gold_sql=query)) is not None:
            play.sql(query)
            scores.append((play.reward() or {})["sql"])
    print(len(scores), sum(scores))
    assert len(scores) >= 160 and set(scores) == {1.0}


def begun(**row: Any) -> SQL | None:
    """A play; None where SQLite does not run the gold query, which was written for MySQL or has a slip."""
    play = SQL()
    try:
        play.reset(**row)
    except sqlite3.Error:
        return None
    return play


def as_tables(row: Mapping[str, Any]) -> dict[str, Any]:
    return {row["table"]["table_name"]: row["table"]["table_info"]}


def test_gold_queries_of_agentbench_score_1_and_their_labels_are_found(shared_data: Path) -> None:
    SQL.load(None, False, 20, 5.0, True)
    scores, labels = [], []
    for name in ("standard", "dev"):
        for row in rows_of(shared_data / "agentbench_db" / "dev" / f"dbbench_{name}.jsonl.gz"):
            query = (row.get("sql") or {}).get("query", "select")
            if (play := begun(tables=as_tables(row), gold_sql=query)) is not None:
                shown = play.sql(query)
                scores.append((play.reward() or {})["sql"])
                labels.append(str(row["label"][0]).lower() in shown.lower())
    print(len(scores), sum(scores), sum(labels))
    assert len(scores) >= 50 and set(scores) == {1.0}
    assert sum(labels) >= 20, "the others' labels are not what their own query gives"


def test_sql_bounds_the_bytes_of_a_result_not_its_rows_alone() -> None:
    SQL.load(None, False, 20, 5.0, True)
    play = SQL()
    play.reset(TABLES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = "with recursive c(n) as (select 1 union all select n + 1 from c limit 10000) select zeroblob(1000000) from c"
    with pytest.raises(ValueError, match="more than 67,108,864 bytes"):
        play.sql(many)
    with pytest.raises(MemoryError, match="more memory than it may have"):
        play.sql(f"select {', '.join(['zeroblob(1000000)'] * 1000)}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10
    assert play.sql("select count(*) from t").startswith("count(*)\n2")


@pytest.mark.parametrize(
    "spoils",
    [
        ("insert into t values (cast(x'ff' as text), 1)",),
        ("create table u(a, b as (zeroblob(1000000)))", f"{ENDLESS} insert into u(a) select n from r limit 2000"),
    ],
)
def test_tables_that_cannot_be_read_at_the_end_are_the_policy_s_fault(spoils: tuple[str, ...]) -> None:
    SQL.load(None, True, 20, 5.0, True)
    play = SQL()
    play.reset(TABLES, gold_sql="delete from t")
    for query in spoils:
        play.sql(query)
    assert play.reward() == {"sql": 0.0}


# ---------------------------------------------------------------------------------------------------- mcp

SERVER = '''
import os, sys, time
from mcp.server.mcpserver import MCPServer

server, count = MCPServer("shop"), 0


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


@server.tool()
def bump() -> str:
    """Count."""
    global count
    count += 1
    return str(count)


@server.tool()
def fail(how: str) -> str:
    """Fail."""
    if how == "die":
        os._exit(3)
    if how == "raise":
        raise ValueError("no")
    time.sleep(60)
    return ""


server.run("streamable-http", port=int(sys.argv[1])) if sys.argv[1:] else server.run("stdio")
'''
MCP_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"a": 2}), ("add", {"a": "x"}), ("bump", {}), ("bump", {}), ("fail", {"how": "raise"}), ("nope", {}),
]  # fmt: skip
MCP_TOLD = [
    "3", "error: add: a: 'x' is not of type 'integer'", "1", "2", "error: ValueError: Error executing tool fail",
    "error: there is no tool 'nope'; there are add, bump, fail",
]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Path:
    pytest.importorskip("mcp", reason="MCP servers need pip install 'whet[mcp]'")
    (tmp_path / "server.py").write_text(SERVER)
    return tmp_path / "server.py"


def test_an_mcp_server_of_each_play_dies_with_it(server: Path) -> None:
    with environment(kind="mcp", command=[sys.executable, str(server)], limits={"call_s": 2}) as made:
        for _ in range(2):
            assert played(made, MCP_CALLS)[0][1:] == MCP_TOLD, "counted anew"
        with pytest.raises(EnvironmentFailure, match=r"server\.py: is gone"):
            played(made, [("fail", {"how": "die"})])
        with pytest.raises(PolicyFault, match="did not answer within 2 s"):
            played(made, [("fail", {"how": "hang"})])
    for _ in range(500):  # the kernel is on it
        alive = [file for file in Path("/proc").glob("[0-9]*/cmdline") if str(server).encode() in _read(file)]
        if not alive:
            return
        time.sleep(0.01)
    raise AssertionError("a server lives on")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_an_mcp_server_may_be_shared_over_http(server: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(server), str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        with environment(kind="mcp", url=f"http://127.0.0.1:{port}/mcp", only=["bump"]) as made:
            assert [played(made, [("bump", {})])[0][1] for _ in range(2)] == ["1", "2"]
            process.kill()
            process.wait()
            with pytest.raises(EnvironmentFailure, match="cannot be reached"):
                played(made, [("bump", {})])
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ConfigError, match=r"environment: .*cannot be reached"):
        ToolEnvironments(EnvironmentConfig.model_validate({"kind": "mcp", "url": f"http://127.0.0.1:{port}/mcp"}))


def test_without_mcp_the_pip_command_is_named() -> None:
    if importlib.util.find_spec("mcp") is not None:
        pytest.skip("mcp is installed")
    with pytest.raises(ConfigError, match=r"need mcp; pip install 'whet\[mcp\]'"):
        ToolEnvironments(EnvironmentConfig.model_validate({"kind": "mcp", "command": ["server"]}))


# ------------------------------------------------------------------------------------------------ together

DESK = '''
class Desk:
    def reset(self, name: str):
        self.name, self.noted = name, ""
        return f" I am {name}."

    def note(self, text: str) -> str:
        """Note something.

        Args:
            text: What.
        """
        self.noted = text
        return "noted"

    def turn_reward(self):
        return 0.25

    def reward(self):
        return float(self.noted == self.name)
'''


def test_tools_go_together_with_a_class_and_their_worths_add_up(tmp_path: Path) -> None:
    (tmp_path / "desk.py").write_text(DESK)
    tools = [{"kind": "sql", "show": False}, {"kind": "python"}, {"kind": "calculator"}]
    with environment(path=f"{tmp_path / 'desk.py'}:Desk", tools=tools) as made:
        assert [tool["function"]["name"] for tool in made.tools] == ["note", "sql", "python", "calculator"]
        assert made.needs == ["name"] and set(made.takes or ()) == {"name", "tables", "gold_sql"}
        calls = [
            *sql("select b from t"),
            *python("1 + 1"),
            ("calculator", {"expression": "2*3"}),
            ("note", {"text": "Jo"}),
        ]
        told, worth = played(made, calls, name="Jo", tables=TABLES, gold_sql="select b from t", other=1)
        assert told == ["Go. I am Jo.", "b\n2\n4\n(2 rows)", "2", "6", "noted"]
        assert worth == {"reward": 1.0, "sql": 1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "python", "call_s": 10}, "python: call_s 10 must be below limits.call_s 10"),
        ({"kind": "mcp"}, "started by its command, or reached at its url"),
        ({"kind": "snake"}, "kind"),
        ({"tools": [{"kind": "sql", "writable": True}]}, "writable"),
        ({"path": "a.py:A", "user": {"script": "a.py:f"}}, "user is for kind: dialogue"),
    ],
)
def test_what_a_tool_cannot_be_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvironmentConfig.model_validate(config)


def test_a_section_is_tried_by_hand_like_a_class() -> None:
    looked = try_environment(
        "{kind: sql}", "", json.dumps({"tables": TABLES}), ['sql={"query": "select a from t"}'], "Go."
    )
    assert looked.same and "tool: a\n1\nx\n(2 rows)" in looked.play and looked.columns == "tables, gold_sql"
    for section, why in (
        ("{kind: sql, row: 3}", r"environment: row: Extra inputs"),
        ("{kind: python, call_s: 20}", r"environment: Value error, python: call_s 20 must be below"),
        ("{kind: endpoint, command: [a]}", "need a run"),
    ):
        with pytest.raises(ConfigError, match=why):
            section_of(section)


def test_threads_that_load_leaves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "desk.py").write_text(
        DESK.replace("    def reset", "    @classmethod\n    def load(cls):\n        import threading, time\n"
                     "        threading.Thread(target=time.sleep, args=(60,), daemon=True, name='poller').start()\n\n"
                     "    def reset", 1)
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"load left threads running \(poller\), and plays are forked without them"):
        ToolEnvironments(EnvironmentConfig(path=f"{tmp_path / 'desk.py'}:Desk"))
