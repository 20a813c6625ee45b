"""Rows from files, folders and the hub, one at a time, each with its file and line.

Memory is bounded by one line, one Parquet batch or one page of an Arrow file (only a `.json` list is read whole).
Nothing damaged passes as data: `strict` says what damage is, and compressed files that end early are errors, too.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from whet.config import DataConfig
from whet.data.base import Origin, Row
from whet.data.faults import BadRow, Dropped, Rejects, nearest
from whet.data.known import Known, unfold
from whet.data.strict import check_text, explain, parse_json
from whet.errors import DataError

LONGEST_LINE = 32 * 2**20
"""Bytes. A longer line is no training example, and reading it could fill the memory."""

BATCH_ROWS = 256
"""Rows of a Parquet file that are held at once."""

Stream = gzip.GzipFile | BufferedReader

Reject = Callable[[BadRow], None]

Example = TypeVar("Example")


def _raise(bad: BadRow) -> None:
    raise bad


def read_rows(config: DataConfig, reject: Reject = _raise) -> Iterator[Row]:
    """The rows of `config.path`, lazily and in order; `limit` is left to the caller.

    A row that cannot be parsed goes to `reject`, which raises it or lets reading go on. A source that cannot be
    read at all (missing, truncated, of an unknown kind, unreachable) is a `DataError` in any case.
    """
    path = Path(config.path).expanduser()
    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        rows = _saved_dataset(path, config, reject)
    elif path.exists():
        if config.subset is not None or config.split != "train":
            raise DataError(f"{config.path}: files have no subset and no split; leave data.subset and data.split out")
        rows = _files(path, reject)
    elif _kind(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path):
        rows = _hub(config, reject)
    else:
        raise DataError(f"{config.path}: no such file or folder; {_neighbour(path)}")
    yield from rows


def read_examples(
    config: DataConfig, convert: Callable[[Row, DataConfig], Example], known: Known
) -> tuple[list[Example], Dropped]:
    """All rows as `convert` makes them, up to `limit`, and what was left out. Raises `DataError` where none is left.

    Rows of one of the `known` data sets are first made into rows of our formats.
    """
    rejects = Rejects(config.on_bad_row)
    examples: list[Example] = []
    for row in _unfolded(config, known, rejects.add):
        try:
            examples.append(convert(row, config))
        except BadRow as bad:
            rejects.add(bad)
        if len(examples) == config.limit:
            break
    if not examples:
        dropped = rejects.dropped
        why = f"not one row is usable; {dropped.describe()}" if dropped.total else "it has no rows"
        raise DataError(f"{config.path}: {why}")
    return examples, rejects.dropped


def _unfolded(config: DataConfig, known: Known, reject: Reject) -> Iterator[Row]:
    for row in read_rows(config, reject):
        try:
            parts = unfold(row, config, known)
        except BadRow as bad:
            reject(bad)
        else:
            yield from parts


# ------------------------------------------------------------------------------------------------ files


def files_of(config: DataConfig) -> list[Path]:
    """The files whose content decides the rows of a source; of a hub data set those in its local cache."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix not in (".md", ".lock"))
    return sorted(Path(file["filename"]) for file in _loaded(config).cache_files)


def _files(path: Path, reject: Reject) -> Iterator[Row]:
    """A file, or the files of a folder, which must be of one kind."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file() and _kind(file))
    kinds = sorted({_kind(file) or file.suffix for file in files})
    if len(kinds) != 1 or kinds[0] not in _READERS:
        found = f"holds {' and '.join(kinds)} files" if kinds and path.is_dir() else _no_data(path)
        raise DataError(f"{path}: {found}; whet reads one of {', '.join(_READERS)} (each also .gz)")
    for file in files:
        with _opened(file) as stream:
            yield from _READERS[kinds[0]](stream, str(file), reject)


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


def _kind(path: Path) -> str | None:
    """The suffix without `.gz`, where it is one that we read."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in _READERS else None


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
            raise _damaged(source, f"after line {number}", error) from error
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
        raise _damaged(source, "", error) from error
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with tempfile.TemporaryFile() as plain:
            if source.endswith(".gz"):  # Parquet is read from its end, a gzip stream from its start
                shutil.copyfileobj(stream, plain)
            file = pq.ParquetFile(plain if source.endswith(".gz") else stream)
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=BATCH_ROWS))
            yield from _arrow((values for batch in batches for values in batch), source, reject)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise _damaged(source, "", error) from error


def _damaged(source: str, where: str, error: Exception) -> DataError:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{source}: damaged or cut short {where}".rstrip() + f" ({cause}); fetch or write the file again")


_READERS: dict[str, Callable[[Stream, str, Reject], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


# ------------------------------------------------------------------------------------- datasets, the hub


def _saved_dataset(path: Path, config: DataConfig, reject: Reject) -> Iterator[Row]:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _damaged(config.path, "", error) from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise DataError(f"{config.path}: no split {config.split!r}; {nearest(config.split, map(str, dataset))}")
        dataset = dataset[config.split]
    yield from _arrow(iter(dataset), config.path, reject)


def _hub(config: DataConfig, reject: Reject) -> Iterator[Row]:
    yield from _arrow(iter(_loaded(config)), _label(config), reject)


def _label(config: DataConfig) -> str:
    return "/".join(filter(None, (config.path, config.subset, config.split)))


def _loaded(config: DataConfig) -> Any:
    """A data set of the hub, or of its local cache where the hub is not to be asked (`HF_HUB_OFFLINE=1`)."""
    import datasets

    try:
        return datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:
        # Whatever goes wrong in there (network, names, formats), the user's view is the same: it did not load.
        offline = "HF_HUB_OFFLINE is set, so only the cache was tried" if datasets.config.HF_HUB_OFFLINE else ""
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{config.path}: no such file here, and the hub data set {_label(config)} could not be loaded ({cause}); "
            f"{offline or 'check the id, data.subset and data.split'}, or give a local file"
        ) from error


def _arrow(values: Iterator[dict[str, Any]], source: str, reject: Reject) -> Iterator[Row]:
    for number, row in enumerate(values, start=1):
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


def _neighbour(path: Path) -> str:
    """The remedy for a path that does not exist: the nearest name beside it."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    with closing(path.parent.iterdir()) as entries:
        names = sorted(entry.name for entry in entries)[:1000]
    return nearest(path.name, names) if names else f"{path.parent} is empty"
