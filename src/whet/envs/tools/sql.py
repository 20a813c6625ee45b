"""SQL as a tool: SQLite over a file or over the row's tables, with limits, and a reward where the row has the query."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from whet.target import TargetError

STEPS = 1000
"""Instructions of SQLite's machine between two looks at the clock."""
LONGEST, MOST_BYTES = 10_000, 64 << 20
"""Rows of a result that are compared with the gold's; bytes that it may have, and a database may grow to or grow by."""
HEAP_BYTES = 4 * MOST_BYTES
"""Memory that SQLite may use, beside a copy of the file: for what it sorts, and for the values of one row."""
GOLD_S, READ_S = 60.0, 30.0
"""Seconds that the gold query may take; and reading what a play left in its tables."""
READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)  # fmt: skip
NEVER = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_CREATE_VTABLE})
"""What no query may do, even where tables may be changed: all that reaches files is among it (VACUUM attaches)."""
ABOUT = frozenset({"table_info", "table_list", "table_xinfo", "foreign_key_list", "index_list", "index_info"})
"""Pragmas that only tell."""
Rows = list[tuple[Any, ...]]


class SQL:
    """An environment with one tool, and with a reward for a query that gives what the gold one gives."""

    _database: ClassVar[Path | None]
    _write: ClassVar[bool]
    _rows: ClassVar[int]
    _call_s: ClassVar[float]
    _show: ClassVar[bool]

    @classmethod
    def load(cls, database: str | None, write: bool, rows: int, call_s: float, show: bool) -> None:
        """Look at the file. Raises `TargetError`."""
        cls._database = None if database is None else Path(database).resolve()
        cls._write, cls._rows, cls._call_s, cls._show = write, rows, call_s, show
        try:
            with closing(cls._opened({})) as connection:
                _definitions(connection)
                size = 0 if cls._database is None else cls._database.stat().st_size
                connection.execute(f"PRAGMA hard_heap_limit = {size + HEAP_BYTES}")  # of this process and its forks
        except sqlite3.Error as error:
            raise TargetError(f"{database}: no database of SQLite ({error}); name one in database") from error

    def reset(self, tables: Mapping[str, Mapping[str, Any]] | None = None, gold_sql: str | None = None) -> str | None:
        """A database of the play's own where it may be changed; what the gold query gives, found in another.

        `tables`: name -> {columns: [names, or {name, type}], rows: [[...]]}.
        """
        tables = tables or {}
        self._result: Rows | None = None
        self._gold: Any = None
        self._reads = gold_sql is not None and re.match(r"\s*(select|with|values)\b", gold_sql, re.I) is not None
        if gold_sql is not None:
            self._ordered = "order by" in _outermost(gold_sql).lower()
            with closing(self._opened(tables, copied=not self._reads)) as other:
                self._gold = _compared(self._run(other, gold_sql, GOLD_S)[1], self._ordered)
                self._gold = self._gold if self._reads else _contents(other)
        self._connection = self._opened(tables, copied=self._write)
        shown = "\n\n" + _definitions(self._connection) if self._show else None
        self._connection.set_authorizer(self._allowed)
        return shown

    def sql(self, query: str) -> str:
        """Run one SQL statement in SQLite.

        Args:
            query: The statement.

        """
        names, found = self._run(self._connection, query, self._call_s)
        if not names:
            return f"done; {max(0, self._changed):,} rows changed"
        self._result = found
        shown = [" | ".join(names), *(" | ".join(map(_cell, row)) for row in found[: self._rows])]
        more = len(found) - self._rows
        return "\n".join([*shown, f"[{more:,} more rows]" if more > 0 else f"({len(found)} rows)"])

    def reward(self) -> dict[str, float] | None:
        """1 where the last result has the gold query's rows, or the tables what the gold statement leaves in them."""
        if self._gold is None:
            return None
        if not self._reads:
            return {"sql": float(self._left() == self._gold)}
        return {"sql": float(self._result is not None and _compared(self._result, self._ordered) == self._gold)}

    def _left(self) -> dict[str, Any] | None:
        """The tables as they are now; None where the play left what cannot be read, which is its own fault."""
        until = time.monotonic() + READ_S
        self._connection.set_authorizer(None)
        self._connection.set_progress_handler(lambda: time.monotonic() > until, STEPS)
        try:
            return _contents(self._connection)
        except (sqlite3.Error, ValueError, MemoryError):
            return None

    @classmethod
    def _opened(cls, tables: Mapping[str, Mapping[str, Any]], *, copied: bool = False) -> sqlite3.Connection:
        """The file, which cannot be changed, or a copy of it in memory; with the row's tables."""
        uri = ":memory:" if cls._database is None else f"{cls._database.as_uri()}?mode=ro&immutable=1"
        found = sqlite3.connect(uri, uri=cls._database is not None, isolation_level=None)
        if cls._database is not None and (copied or tables):
            with closing(found) as file:
                found = sqlite3.connect(":memory:", isolation_level=None)
                file.backup(found)
        for name, table in tables.items():
            columns = [each if isinstance(each, str) else f"{each['name']}" for each in table["columns"]]
            types = ["" if isinstance(each, str) else _word(each.get("type", "")) for each in table["columns"]]
            defined = ", ".join(f"{_quoted(c)} {t}".strip() for c, t in zip(columns, types, strict=True))
            found.execute(f"CREATE TABLE {_quoted(name)} ({defined})")
            marks = ", ".join("?" * len(columns))
            found.executemany(f"INSERT INTO {_quoted(name)} VALUES ({marks})", table["rows"])
        found.execute("PRAGMA temp_store = MEMORY")
        pages, size = (found.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        found.execute(f"PRAGMA max_page_count = {pages + MOST_BYTES // size}")
        found.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 20)
        found.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000)
        return found

    def _run(self, connection: sqlite3.Connection, query: str, seconds: float) -> tuple[list[str], Rows]:
        """Names of the columns and rows, at most `LONGEST`. Raises what `_fetched` and SQLite do, or `TimeoutError`."""
        until = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > until, STEPS)
        before = connection.total_changes
        try:
            with closing(connection.execute(query)) as cursor:
                found = _fetched(cursor, MOST_BYTES, LONGEST)
                return [each[0] for each in cursor.description or ()], found
        except sqlite3.OperationalError as error:
            if time.monotonic() > until:
                raise TimeoutError(f"the query took more than {seconds:g} s") from error
            raise
        except MemoryError as error:
            raise MemoryError("the query needs more memory than it may have") from error
        finally:
            self._changed = connection.total_changes - before
            connection.set_progress_handler(None, 0)

    def _allowed(self, action: int, one: str | None, two: str | None, *where: str | None) -> int:
        if action == sqlite3.SQLITE_PRAGMA and one in ABOUT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and two == "load_extension":
            return sqlite3.SQLITE_DENY
        allowed = action in READING or (self._write and action not in NEVER)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _definitions(connection: sqlite3.Connection) -> str:
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
    return "\n".join(sql for (sql,) in found)


def _contents(connection: sqlite3.Connection) -> dict[str, Any]:
    """All tables with their rows, in no order."""
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
    pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("max_page_count", "page_size"))
    found = {}
    for name in names:  # columns may be computed: more than what is stored
        rows = _fetched(connection.execute(f"SELECT * FROM {_quoted(name)}"), pages * size)
        found[name] = _compared(rows, ordered=False)
    return found


def _fetched(cursor: sqlite3.Cursor, most_bytes: int, most: int | None = None) -> Rows:
    """The rows, or the first `most`. Raises `ValueError` where they have more bytes."""
    found: Rows = []
    held = 0
    for row in islice(cursor, most):
        held += sum(len(value) if isinstance(value, str | bytes) else 1 for value in row)
        if held > most_bytes:
            raise ValueError(f"the rows have more than {most_bytes:,} bytes")
        found.append(row)
    return found


def _compared(rows: Sequence[tuple[Any, ...]], ordered: bool) -> list[tuple[Any, ...]]:
    """Rows with numbers that equal ones share, whatever their type, sorted where their order says nothing."""
    plain = [tuple(float(f"{v:.9g}") if isinstance(v, int | float) else v for v in row) for row in rows]
    return plain if ordered else sorted(plain, key=repr)


def _outermost(query: str) -> str:
    """The query without what stands in parentheses."""
    while (shorter := re.sub(r"\([^()]*\)", "", query)) != query:
        query = shorter
    return query


def _cell(value: Any) -> str:
    return "NULL" if value is None else str(value)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _word(text: str) -> str:
    return text if re.fullmatch(r"[\w ()]*", text) else ""
