"""Rows of files: JSON lines, JSON lists, Parquet, Arrow, CSV, each with its file and line, one at a time.

Memory is bounded by one line, one Parquet batch or one page of an Arrow file (only a `.json` list is read whole).
Nothing damaged passes as data: `strict` says what damage is, and compressed files that end early are errors, too.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from whet.data.base import Origin, Row
from whet.data.faults import BadRow
from whet.data.strict import check_text, explain, parse_json
from whet.errors import DataError

LONGEST_LINE = 32 * 2**20
"""Bytes. A longer line is no training example, and reading it could fill the memory."""

PROGRAM = ".py"
"""Suffix of a program that prints rows; in a folder of data files it is none of them."""

LINGER_S = 10.0
"""How long a program may go on after it has closed its output."""

BATCH_ROWS = 256
"""Rows of a Parquet file that are held at once."""

Stream = gzip.GzipFile | BufferedReader

Reject = Callable[[BadRow], None]


def files_of(path: Path) -> list[Path]:
    """The file, or the data files of a folder in order of name, which must be of one kind."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file() and kind_of(file))
    kinds = sorted({kind_of(file) or file.suffix for file in files})
    if path.is_file() and path.suffix == PROGRAM:
        return files
    if len(kinds) != 1 or kinds[0] not in _READERS:
        found = f"holds {' and '.join(kinds)} files" if kinds and path.is_dir() else _no_data(path)
        raise DataError(f"{path}: {found}; whet reads one of {', '.join(_READERS)} (each also .gz)")
    return files


def read_file(file: Path, reject: Reject, split: str = "train") -> Iterator[Row]:
    """The rows of a file, lazily and in order; one that cannot be parsed goes to `reject`.

    A Python program is run with `split` as its argument; the rows are the JSON lines that it prints.

    Raises `DataError` where the file as a whole cannot be read, or is not what its name says.
    """
    if file.suffix == PROGRAM:
        yield from _printed(file, split, reject)
        return
    kind = kind_of(file)
    assert kind is not None, "files_of has looked at the name"
    with _opened(file) as stream:
        _refuse_misnamed(file, kind, stream)
        yield from _READERS[kind](stream, str(file), reject)


def _printed(file: Path, split: str, reject: Reject) -> Iterator[Row]:
    """The rows that a program prints, which is ended where no more are wanted."""
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [sys.executable, file, split], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
        ) as program,
    ):
        assert isinstance(program.stdout, BufferedReader), "a pipe"
        try:
            yield from _jsonl(program.stdout, str(file), reject)
            with suppress(subprocess.TimeoutExpired):  # it has printed all and goes on: it is ended
                program.wait(LINGER_S)
            if program.returncode:
                complaints.seek(0)
                last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise DataError(f"{file}: the program failed with exit code {program.returncode}: {last}; run it alone")
        finally:
            program.kill()


def kind_of(path: Path) -> str | None:
    """The suffix without `.gz`, where it is one that we read."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in _READERS else None


def _no_data(path: Path) -> str:
    """What a path is instead of a data file: `is a .csv file`, `holds no data files, only .csv and .txt`."""
    if path.is_file():
        return f"is a {path.suffix} file" if path.suffix else "is no data file"
    there = sorted({file.suffix for file in path.iterdir() if file.is_file() and file.suffix})
    return f"holds no data files, only {' and '.join(there)}" if there else "holds no data files"


def _opened(file: Path) -> Stream:
    try:
        return gzip.open(file) if file.suffix == ".gz" else file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be opened: {error.strerror}") from error


def _refuse_misnamed(file: Path, kind: str, stream: Stream) -> None:
    """A file whose first bytes are of another kind than its name."""
    try:
        start = stream.peek(64)
    except (OSError, EOFError, zlib.error):
        return  # its reader says what is wrong
    found = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if kind == ".jsonl" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        found = "one JSON list (.json)"
    if found is not None and f"({kind})" not in found:
        named = f"{file.name}.gz" if "gz" in found else file.name.replace(kind, found[found.rindex(".") : -1])
        raise DataError(f"{file}: is {found}, and its name says {kind}; rename it to {named}")


def _jsonl(stream: Stream, source: str, reject: Reject) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream, source), start=1):
        origin = Origin(source=source, line=number)
        if not line.strip():
            continue
        try:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"the line is longer than {LONGEST_LINE // 2**20} MiB")
            value = parse_json(line)
            if not isinstance(value, dict):
                raise ValueError("the line is not a JSON object; every line must look like {...}")
        except (ValueError, RecursionError) as error:
            what, remedy = explain(error)
            if not line.endswith(b"\n") and isinstance(error, json.JSONDecodeError):
                what, remedy = "the last line is cut short", "the file was not written to its end; make it again"
            reject(BadRow(origin, "", what, remedy))
            continue
        yield Row(origin=origin, values=value)


def _lines(stream: Stream, source: str) -> Iterator[bytes]:
    """Lines with their line ends. A line over the limit is given as its first bytes, and the rest is skipped."""
    number = 0
    while True:
        try:
            line = rest = stream.readline(LONGEST_LINE + 1)
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(source, f"after line {number}", error) from error
        if not line:
            return
        number += 1
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json(stream: Stream, source: str, reject: Reject) -> Iterator[Row]:
    """A list of objects; or one object a line, as many `.json` files on the hub are."""
    try:
        if stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            yield from _jsonl(stream, source, reject)
            return
        data = stream.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(source, "", error) from error
    try:
        values = parse_json(data) if data.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{error.lineno}: not valid JSON; {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: {'; '.join(filter(None, explain(error)))}") from error
    if not isinstance(values, list):
        raise DataError(f"{source}: not a list of objects; a .json file must look like [{{...}}, {{...}}]")
    for number, value in enumerate(values, start=1):
        origin = Origin(source=source, line=number)
        if isinstance(value, dict):
            yield Row(origin=origin, values=value)
        else:
            reject(BadRow(origin, "", "the item is not a JSON object", "every item of the list must look like {...}"))


def _parquet(stream: Stream, source: str, reject: Reject) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _seekable(stream, source) as file:
        batches = pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS)
        yield from rows_of((row for batch in batches for row in batch.to_pylist()), source, reject)


def _arrow(stream: Stream, source: str, reject: Reject) -> Iterator[Row]:
    """Both of Arrow's formats: the file, which has an index at its end (Feather), and the stream (`datasets`)."""
    import pyarrow as pa

    with _seekable(stream, source) as file:
        if file.read(6) == b"ARROW1":
            indexed = pa.ipc.open_file(file)
            batches = (indexed.get_batch(number) for number in range(indexed.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pa.ipc.open_stream(file))
        parts = (batch.slice(at, BATCH_ROWS) for batch in batches for at in range(0, len(batch), BATCH_ROWS))
        yield from rows_of((row for part in parts for row in part.to_pylist()), source, reject)


@contextmanager
def _seekable(stream: Stream, source: str) -> Iterator[Any]:
    """The stream's bytes in any order (a gzip stream has only one); errors of Arrow become errors of the file."""
    import pyarrow as pa

    try:
        with tempfile.TemporaryFile() as plain:
            if source.endswith(".gz"):
                shutil.copyfileobj(stream, plain)
                plain.seek(0)
            yield plain if source.endswith(".gz") else stream
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise damaged(source, "", error) from error


def _csv(stream: Stream, source: str, reject: Reject) -> Iterator[Row]:
    """A header, then rows; every cell is text, an empty one is absent. The file is in UTF-8, quoted as Excel does."""
    csv.field_size_limit(LONGEST_LINE)
    delimiter = "\t" if ".tsv" in Path(source).suffixes else ","
    lines = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    before = 0
    try:
        names = next(lines, [])
        if len(set(names)) != len(names):
            raise DataError(f"{source}:1: two columns have the same name; the first line must name every column once")
        while True:
            before = lines.line_num
            cells = next(lines, None)
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            origin = Origin(source=source, line=before + 1)
            if len(cells) != len(names):
                reject(BadRow(origin, "", "not one cell for each column", f"{len(cells)} cells, {len(names)} columns"))
                continue
            row = {name: cell or None for name, cell in zip(names, cells, strict=True)}
            yield from rows_of(iter([row]), source, reject, first=origin.line)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(source, f"after line {before}", error) from error
    except (csv.Error, UnicodeDecodeError) as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not valid CSV ({error})"
        raise DataError(f"{source}:{before + 1}: {what}; write the file again") from error


def rows_of(values: Iterator[dict[str, Any]], source: str, reject: Reject, *, first: int = 1) -> Iterator[Row]:
    """Rows that are parsed already, numbered from `first`; those with text that no tokenizer can take are rejected."""
    for number, row in enumerate(values, start=first):
        origin = Origin(source=source, line=number)
        try:
            check_text(row)
        except (ValueError, RecursionError) as error:
            reject(BadRow(origin, "", *explain(error)))
            continue
        yield Row(origin=origin, values={name: _without_nulls(value) for name, value in row.items()})


def _without_nulls(value: Any) -> Any:
    """The value without null fields: an Arrow struct has all keys in all rows, so null is how it says "absent"."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def damaged(source: str, where: str, error: Exception) -> DataError:
    """The complaint about a file that cannot be read to its end."""
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{source}: damaged or cut short {where}".rstrip() + f" ({cause}); fetch or write the file again")


_READERS: dict[str, Callable[[Stream, str, Reject], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".tsv": _csv,
}

_MAGIC = {b"\x1f\x8b": "compressed (.gz)", b"PAR1": "Parquet (.parquet)", b"ARROW1": "Arrow (.arrow)"}
"""How files of a kind begin."""
