"""Where rows come from: files, a folder that `datasets` saved, or the hub; and what they are, as a digest.

Rows are read one at a time, each with its file and line. `content_of` names what there is to read by its bytes, so that
rows made from it are known again wherever the files lie, and a changed file is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from whet.config import DataConfig
from whet.data.base import Row
from whet.data.faults import BadRow, Dropped, Rejects, nearest
from whet.data.known import Known, unfold
from whet.data.messages import MESSAGE_KEYS, TOOL_COLUMNS
from whet.data.readers import PROGRAM, Reject, damaged, files_of, kind_of, read_file, rows_of
from whet.errors import DataError
from whet.files import Digest, digest_file

Example = TypeVar("Example")


def _raise(bad: BadRow) -> None:
    raise bad


def read_rows(config: DataConfig, reject: Reject = _raise) -> Iterator[Row]:
    """The rows of `config.path`, lazily and in order; `limit` is left to the caller.

    A row that cannot be parsed goes to `reject`, which raises it or lets reading go on. A source that cannot be
    read at all (missing, truncated, of an unknown kind, unreachable) is a `DataError` in any case.
    """
    place = _place(config)
    if place == "files":
        for file in files_of(_path(config)):
            yield from read_file(file, reject, config.split)
    elif place == "saved":
        yield from rows_of(iter(_saved(config)), config.path, reject)
    else:
        with _reaching(config):
            yield from rows_of(iter(_hub(config)), _label(config), reject)


def read_examples(
    config: DataConfig, convert: Callable[[Row, DataConfig], Example], known: Known, *, keeps_columns: bool = False
) -> tuple[list[Example], Dropped]:
    """All rows as `convert` makes them, up to `limit`, and what was left out. Raises `DataError` where none is left.

    `keeps_columns`: those that it does not read go on to rewards.
    """
    rejects = Rejects(config.on_bad_row, keeps_columns=keeps_columns)
    return list(stream_examples(config, convert, known, rejects)), rejects.dropped


def stream_examples(
    config: DataConfig, convert: Callable[[Row, DataConfig], Example], known: Known, rejects: Rejects
) -> Iterator[Example]:
    """The same, one at a time.

    Rows of one of the `known` data sets are first made into rows of our formats.
    """
    found = 0
    for row in _unfolded(config, known, rejects):
        try:
            example = convert(row, config)
        except BadRow as bad:
            rejects.add(bad)
            continue
        found += 1
        yield example
        if found == config.limit:
            return
    if not found:
        dropped = rejects.dropped
        why = f"not one row is usable; {dropped.describe()}" if dropped.total else "it has no rows"
        raise DataError(f"{config.path}: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[Example]):
    """Examples that are to be read, once."""

    examples: Iterable[Example]
    rejects: Rejects
    """Takes what cannot be read while they are."""
    sources: Sequence[str]
    """What `Origin.source` of the examples may be."""
    digest: str | None = None
    """Changes when other examples would be read; None: not known beforehand."""
    bytes: int = 0
    """Of files that several processes may read at once; 0: none may."""


def reading(config: DataConfig, convert: Callable[[Row, DataConfig], Example], known: Known) -> Reading[Example]:
    """The examples of a source, not read yet. Raises `DataError` where there is no such source."""
    rejects, files = Rejects(config.on_bad_row), _files(config)
    return Reading(
        examples=stream_examples(config, convert, known, rejects),
        rejects=rejects,
        sources=[*map(str, files)] if _place(config) == "files" else [config.path, _label(config)],
        digest=digest_of(config),
        bytes=sum(file.stat().st_size for file in files if file.suffix != PROGRAM),
    )


def _unfolded(config: DataConfig, known: Known, rejects: Rejects) -> Iterator[Row]:
    if not rejects.keeps_columns:
        _refuse_unknown(config)
    made = Path(config.path).with_name("stage.json").is_file()  # by a stage: its other columns are for later stages
    for row in read_rows(config, rejects.add):
        try:
            parts = unfold(row, config, known)
        except BadRow as bad:
            rejects.add(bad)
        else:
            if not made and any(
                part is row for part in parts
            ):  # of a known data set it is known which columns are read
                rejects.unread.update(_unread(row, config, keeps_columns=rejects.keeps_columns))
            yield from parts


# ------------------------------------------------------------------------------------ columns that nothing reads


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""What a model of text never sees, though a text may have a place for it (`<image>`)."""
READ = frozenset({
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system", "text",
    "answers", "ranks", "scores", "chosen", "rejected", "chosen_messages", "rejected_messages", "preferred_output",
    "non_preferred_output", "label", "labels", "steps", "ratings", "margin", "confidence", "chat_template_kwargs",
    "enable_thinking", *TOOL_COLUMNS,
})  # fmt: skip
"""Columns that some format reads."""
CHATS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Those that may hold messages, whose own keys are looked at too: `messages[].date`."""


def _refuse_unknown(config: DataConfig) -> None:
    """Raise `DataError` where `data.columns` gives a name that no format reads: it would have no effect."""
    for ours in config.columns:
        if ours not in READ:
            raise DataError(f"data.columns: {ours!r} is no column that whet reads; {nearest(ours, sorted(READ))}")


def _unread(row: Row, config: DataConfig, *, keeps_columns: bool) -> Iterator[str]:
    """Columns with a value that are not read. `keeps_columns`: the others go on to rewards, and only what the model
    would have to be shown is named."""
    mapped = set(re.findall(r"[^{}.\[\]]+", " ".join(f"{{{entry}}}" for entry in config.columns.values())))
    for name, value in row.values.items():
        known = name in READ or name in mapped
        if value not in (None, "", [], {}) and (name in (*MEDIA, *TOOL_COLUMNS) if keeps_columns else not known):
            yield name
        if name in CHATS and isinstance(value, list):
            keys = {key for message in value if isinstance(message, dict) for key in message if message[key]}
            yield from (f"{name}[].{key}" for key in sorted(keys - MESSAGE_KEYS))


# ---------------------------------------------------------------------------------------------- content


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a source holds, wherever it lies."""

    parts: Mapping[str, str]
    """SHA-256 of the bytes of each file by its name, in the order in which they are read; of a streamed data set the
    revision or the date of each file, since its bytes are elsewhere."""
    lines: int = 0
    """Lines of its `.jsonl` files."""

    @property
    def digest(self) -> str:
        """SHA-256 of all of it; names do not count."""
        return hashlib.sha256(json.dumps(list(self.parts.values())).encode()).hexdigest()


def content_of(config: DataConfig, digest: Callable[[Path], Digest] = digest_file) -> Content:
    """The digests of what `read_rows` would read, by reading bytes (1 GB a second or more) and parsing nothing.

    `digest` gives that of a file. Raises `DataError` as `read_rows` does.
    """
    if config.streaming:
        import datasets

        with _reaching(config):
            listed = datasets.load_dataset_builder(config.path, config.subset).config.data_files or {}
        split = listed.get(config.split, [])
        return Content(parts={str(n): f"{n} {m}" for n, m in zip(split, split.origin_metadata, strict=True)})
    if files := _files(config):
        return _digests(files, digest)
    rows = hashlib.sha256()  # it is in memory only
    for row in _dataset(config):
        rows.update(repr(row).encode("utf-8", "surrogatepass"))
    return Content(parts={_label(config): rows.hexdigest()})


def digest_of(config: DataConfig) -> str:
    """SHA-256 of the rows that a source gives: its content, and the keys that choose or change them; not where it lies.

    Raises `DataError` as `read_rows` does.
    """
    keys = config.model_dump_json(exclude={"path", "weight", "on_bad_row"})
    return hashlib.sha256(f"{content_of(config).digest} {keys}".encode()).hexdigest()


def _files(config: DataConfig) -> list[Path]:
    """The files in which the rows are; none of rows that are streamed, or in memory only. Raises `DataError`."""
    if _place(config) == "files":
        return files_of(_path(config))
    return [] if config.streaming else [Path(file["filename"]) for file in _dataset(config).cache_files]


def _digests(files: list[Path], digest: Callable[[Path], Digest]) -> Content:
    found = {file.name: digest(file) for file in files}
    lines = sum(each.lines for name, each in found.items() if name.endswith(".jsonl"))
    return Content(parts={name: each.sha256 for name, each in found.items()}, lines=lines)


# ------------------------------------------------------------------------------------- datasets, the hub


def _place(config: DataConfig) -> Literal["files", "saved", "hub"]:
    path = _path(config)
    if config.streaming:
        return "hub"
    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return "saved"
    if path.exists():
        if config.subset is not None or (config.split != "train" and path.suffix != PROGRAM):
            raise DataError(f"{config.path}: files have no subset and no split; leave data.subset and data.split out")
        return "files"
    if kind_of(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path):
        return "hub"
    raise DataError(f"{config.path}: no such file or folder; {_neighbour(path)}")


def _path(config: DataConfig) -> Path:
    return Path(config.path).expanduser()


def _label(config: DataConfig) -> str:
    return "/".join(filter(None, (config.path, config.subset, config.split)))


def _dataset(config: DataConfig) -> Any:
    return _saved(config) if _place(config) == "saved" else _hub(config)


def _saved(config: DataConfig) -> Any:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(_path(config)))
    except Exception as error:
        raise damaged(config.path, "", error) from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise DataError(f"{config.path}: no split {config.split!r}; {nearest(config.split, map(str, dataset))}")
        dataset = dataset[config.split]
    return dataset


def _hub(config: DataConfig) -> Any:
    """A data set of the hub, or of its local cache where the hub is not to be asked (`HF_HUB_OFFLINE=1`).

    A streamed one is fetched while it is read, and may lie in a local folder as well.
    """
    import datasets

    with _reaching(config):
        if config.streaming:
            return datasets.load_dataset(config.path, config.subset, split=config.split, streaming=True)
        return _loaded(config.path, config.subset, config.split)


@lru_cache(maxsize=4)
def _loaded(path: str, subset: str | None, split: str) -> Any:
    """Kept, since it is asked for its content and for its rows, and looking it up takes seconds."""
    import datasets

    return datasets.load_dataset(path, subset, split=split)


@contextmanager
def _reaching(config: DataConfig) -> Iterator[None]:
    """Whatever goes wrong in there (network, names, formats), the user's view is the same: it did not load."""
    import datasets

    try:
        yield
    except DataError:
        raise
    except Exception as error:
        offline = "HF_HUB_OFFLINE is set, so only the cache was tried" if datasets.config.HF_HUB_OFFLINE else ""
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{config.path}: no such file here, and the hub data set {_label(config)} could not be loaded ({cause}); "
            f"{offline or 'check the id, data.subset and data.split'}, or give a local file"
        ) from error


def _neighbour(path: Path) -> str:
    """The remedy for a path that does not exist: the nearest name beside it."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    with closing(path.parent.iterdir()) as entries:
        names = sorted(entry.name for entry in entries)[:1000]
    return nearest(path.name, names) if names else f"{path.parent} is empty"
