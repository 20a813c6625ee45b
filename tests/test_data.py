"""Sources: what is read is what is there, and what is damaged is named by file and line, or counted."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whet.config import DataConfig
from whet.data import readers
from whet.data.faults import BadRow
from whet.data.formats import load_conversations, load_tasks
from whet.data.sources import content_of, read_rows
from whet.errors import DataError

ROWS = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "Grüße\u2028👋", "completion": "Hallo"}]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def config(**fields: Any) -> DataConfig:
    return DataConfig(**{"path": "train.jsonl", **fields})


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow(path: Path, *, indexed: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    make = pa.ipc.new_file if indexed else pa.ipc.new_stream
    with make(path, table.schema) as writer:
        writer.write_table(table)


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(*ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(*ROWS))),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(*ROWS)),
    "crlf.jsonl": lambda path: path.write_bytes(jsonl(*ROWS).replace(b"\n", b"\r\n")),
    "no_last_newline.jsonl": lambda path: path.write_bytes(jsonl(*ROWS).rstrip()),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "lines.json": lambda path: path.write_bytes(jsonl(*ROWS)),
    "a.parquet": write_parquet,
    "stream.arrow": lambda path: write_arrow(path, indexed=False),
    "indexed.arrow": lambda path: write_arrow(path, indexed=True),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows = list(read_rows(config(path=str(tmp_path / name))))
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.origin.line for row in rows] == [1, 2]
    assert str(rows[1].origin) == f"{tmp_path / name}:2"


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_cells_are_text_and_rows_know_the_line_they_begin_on(tmp_path: Path, name: str, delimiter: str) -> None:
    write_csv(tmp_path / "plain", delimiter)
    data = (tmp_path / "plain").read_bytes() + f'"two\r\nlines"{delimiter}\r\n\r\nshort\r\nc{delimiter}1\r\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    bad: list[BadRow] = []
    rows = list(read_rows(config(path=str(tmp_path / name)), bad.append))
    more = [{"prompt": "two\r\nlines", "completion": None}, {"prompt": "c", "completion": "1"}]
    assert [dict(row.values) for row in rows] == [*ROWS, *more]
    assert [row.origin.line for row in rows] == [2, 3, 4, 8]
    assert [str(each) for each in bad] == [f"{tmp_path / name}:7: not one cell for each column; 1 cells, 2 columns"]


def test_a_streamed_data_set_is_read_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(*ROWS))
    (tmp_path / "b.jsonl").write_bytes(b"{broken\n")
    asked = config(path=str(tmp_path), streaming=True, limit=2)
    loaded, _ = load_conversations(asked)
    assert [example.messages[0].content for example in loaded] == [row["prompt"] for row in ROWS]
    with pytest.raises(DataError, match="could not be loaded"):
        load_conversations(config(path=str(tmp_path), streaming=True))
    before = content_of(asked).digest
    (tmp_path / "b.jsonl").write_bytes(jsonl(*ROWS))
    assert content_of(asked).digest != before


def test_content_is_bytes_wherever_they_lie_and_any_change_of_them(tmp_path: Path) -> None:
    for folder, last in (("one", b"\n"), ("two", b"\n"), ("other", b" \n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(jsonl(*ROWS))
        (tmp_path / folder / "b.jsonl").write_bytes(jsonl(*ROWS)[:-1] + last)
    one, two, other = (content_of(config(path=str(tmp_path / name))) for name in ("one", "two", "other"))
    assert one == two and one.digest == two.digest != other.digest
    assert one.parts["a.jsonl"] == other.parts["a.jsonl"] and one.parts["b.jsonl"] != other.parts["b.jsonl"]
    for name in ("saved", "splits"):
        WRITERS[name](tmp_path / name)
        assert len(content_of(config(path=str(tmp_path / name))).digest) == 64
    with pytest.raises(DataError, match="no such file"):
        content_of(config(path=str(tmp_path / "gone.jsonl")))


def test_parquet_may_be_compressed_again(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert [dict(row.values) for row in read_rows(config(path=str(tmp_path / "b.parquet.gz")))] == ROWS


def test_a_folder_is_its_files_in_order_of_name(tmp_path: Path) -> None:
    for name, index in (("b.jsonl", 1), ("a.jsonl.gz", 0)):
        data = jsonl(ROWS[index])
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "README.md").write_text("about")
    assert [str(row.origin) for row in read_rows(config(path=str(tmp_path)))] == [
        f"{tmp_path / 'a.jsonl.gz'}:1",
        f"{tmp_path / 'b.jsonl'}:1",
    ]
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(DataError, match=r"holds \.json and \.jsonl files"):
        list(read_rows(config(path=str(tmp_path))))


def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[0]) + b"{broken\n")
    rows = read_rows(config(path=str(tmp_path / "a.jsonl")))
    assert next(rows).values == ROWS[0]
    with pytest.raises(BadRow):
        next(rows)
    loaded, dropped = load_conversations(config(path=str(tmp_path / "a.jsonl"), limit=1))
    assert len(loaded) == 1 and dropped.total == 0


GOOD = jsonl({"text": "fine"})
DAMAGE = {
    "broken line": (b'{"text": "a",}\n' + GOOD, "not valid JSON"),
    "not JSON": (b"hello\n" + GOOD, "not valid JSON"),
    "single quotes": (b"{'text': 'a'}\n" + GOOD, "not valid JSON"),
    "two objects on a line": (b'{"text": "a"} {"text": "b"}\n' + GOOD, "not valid JSON"),
    "raw NUL": (b'{"text": "a\x00b"}\n' + GOOD, "not valid JSON"),
    "zeros after a crash": (b"\x00" * 64 + b"\n" + GOOD, "not valid JSON"),
    "raw tab in a string": (b'{"text": "a\tb"}\n' + GOOD, "not valid JSON"),
    "escaped NUL": (b'{"text": "a\\u0000b"}\n' + GOOD, "NUL character"),
    "lone surrogate": (b'{"text": "a\\ud83d"}\n' + GOOD, "half of a surrogate pair"),
    "lone surrogate in a key": (b'{"text": {"\\udc00": 1}}\n' + GOOD, "half of a surrogate pair"),
    "Latin-1": ('{"text": "Grüße"}\n'.encode("latin-1") + GOOD, "not UTF-8.*0xfc"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16") + b"\n" + GOOD, "not UTF-8.*0xff"),
    "cut in a character": (b'{"text": "\xf0\x9f\x91"}\n' + GOOD, "not UTF-8"),
    "NaN": (b'{"text": "a", "score": NaN}\n' + GOOD, "NaN is not JSON"),
    "Infinity": (b'{"text": "a", "score": -Infinity}\n' + GOOD, "-Infinity is not JSON"),
    "overflowing number": (b'{"text": "a", "score": 1e999}\n' + GOOD, "overflows"),
    "huge int": (b'{"text": "a", "score": ' + b"9" * 5000 + b"}\n" + GOOD, "a number has 5000 digits"),
    "duplicate keys": (b'{"text": "a", "text": "b"}\n' + GOOD, "a key stands twice"),
    "deep nesting": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + GOOD, "nested too deeply"),
    "a list": (b'["text", "a"]\n' + GOOD, "not a JSON object"),
    "a string": (b'"text"\n' + GOOD, "not a JSON object"),
    "null": (b"null\n" + GOOD, "not a JSON object"),
    "wrong type": (b'{"text": 3}\n' + GOOD, "text: not text; it is a number"),
    "missing column": (b'{"txt": "a"}\n' + GOOD, "columns of no known format; there are: txt"),
    "empty text": (b'{"text": "  "}\n' + GOOD, "text: empty text"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    data, message = DAMAGE[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + data)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        load_conversations(config(path=str(path)))
    loaded, dropped = load_conversations(config(path=str(path), on_bad_row="drop"))
    assert [(example.text, example.origin.line) for example in loaded] == [("fine", 1), ("fine", 3)]
    assert dropped.total == 1 and str(dropped.rows[0]).startswith(f"{path}:2: ")
    assert dropped.describe().startswith("1 row dropped: 1 x ")


def test_half_a_last_line_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + GOOD[:-5])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the last line is cut short"):
        load_conversations(config(path=str(tmp_path / "a.jsonl")))


def test_a_line_too_long_to_hold_is_skipped_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 2**20)
    (tmp_path / "a.jsonl").write_bytes(GOOD + jsonl({"text": "x" * 3 * 2**20}) + GOOD)
    loaded, dropped = load_conversations(config(path=str(tmp_path / "a.jsonl"), on_bad_row="drop"))
    assert [example.origin.line for example in loaded] == [1, 3]
    assert list(dropped.counts) == ["the line is longer than 1 MiB"]


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "it has no rows"),
        ("a.jsonl", b"\n \n", "it has no rows"),
        ("a.json", b"", "it has no rows"),
        ("a.json", b"[]", "it has no rows"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"a\.json:2: not valid JSON"),
        ("a.json", b'"text"', "not a list of objects"),
        ("a.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], r"damaged or cut short after line"),
        ("a.jsonl.gz", b"not gzip", "damaged or cut short"),
        ("a.parquet", b"PAR1 and then nothing", "damaged or cut short"),
        ("a.txt", b"text\nfine\n", r"a\.txt: is a \.txt file; whet reads one of \.jsonl, \.json, \.parquet"),
        ("a.arrow", b"ARROW1 and then nothing", "damaged or cut short"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: two columns have the same name"),
        ("a.csv", b'text\na\n"b\n', r"a\.csv:3: not valid CSV"),
        ("a.csv", b"text\na\n\xff\n", r"a\.csv:.: not UTF-8"),
        ("a.csv", b"", "it has no rows"),
        ("a.jsonl", gzip.compress(GOOD, mtime=0), r"compressed \(\.gz\), .* says \.jsonl; rename it to a\.jsonl\.gz"),
        ("a.jsonl", b'[{"text": "a"}]', r"one JSON list \(\.json\), .* says \.jsonl; rename it to a\.json$"),
        ("a.jsonl", b"PAR1", r"Parquet \(\.parquet\), .* says \.jsonl; rename it to a\.parquet"),
        ("README", b"text\nfine\n", r"README: is no data file; whet reads one of"),
    ],
)
def test_a_source_that_cannot_be_read_is_an_error_in_any_case(
    tmp_path: Path, name: str, data: bytes, message: str, on_bad_row: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_conversations(config(path=str(tmp_path / name), on_bad_row=on_bad_row))


def test_a_folder_without_data_files_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files; whet reads one of"):
        list(read_rows(config(path=str(tmp_path))))
    for name in ("a.doc", "b.doc", "notes.txt"):
        (tmp_path / name).write_text("text\n")
    with pytest.raises(DataError, match=r"holds no data files, only \.doc and \.txt; whet reads one of"):
        list(read_rows(config(path=str(tmp_path))))


def test_where_every_row_is_bad_the_reasons_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": ""}, {"text": 1}, {"text": " "}))
    with pytest.raises(
        DataError, match="not one row is usable; 3 rows dropped: 2 x text: empty text; 1 x text: not text"
    ):
        load_conversations(config(path=str(tmp_path / "a.jsonl"), on_bad_row="drop"))


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'train\.jsonl'\?"):
        list(read_rows(config(path=str(tmp_path / "trainn.jsonl"))))
    with pytest.raises(DataError, match="there is no folder"):
        list(read_rows(config(path=str(tmp_path / "no" / "train.jsonl"))))
    with pytest.raises(DataError, match="files have no subset and no split"):
        list(read_rows(config(path=str(tmp_path / "train.jsonl"), split="test")))


def test_an_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    datasets.DatasetDict(training=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="no split 'train'; did you mean 'training'"):
        list(read_rows(config(path=str(tmp_path))))


def test_the_hub_is_asked_by_id_and_its_failure_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, subset: str | None, *, split: str) -> datasets.Dataset:
        if path == "org/here":
            return datasets.Dataset.from_list(ROWS)
        raise ConnectionError(f"Couldn't reach {path!r}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows(config(path="org/here", subset="main", split="test")))
    assert [dict(row.values) for row in rows] == ROWS and str(rows[0].origin) == "org/here/main/test:1"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"org/gone/main/train could not be loaded \(Couldn't reach.*HF_HUB_OFFLINE is set"
    ):
        list(read_rows(config(path="org/gone", subset="main")))


def test_null_struct_fields_of_arrow_are_absent(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    pq.write_table(pa.Table.from_pylist([{"calls": calls, "gold": None}]), tmp_path / "a.parquet")
    (only,) = read_rows(config(path=str(tmp_path / "a.parquet")))
    assert only.values == {"calls": calls, "gold": None}


def test_limit_counts_usable_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}))
    prompts, dropped = load_tasks(config(path=str(tmp_path / "a.jsonl"), limit=2, on_bad_row="drop"))
    assert [prompt.messages[0].content for prompt in prompts] == ["a", "b"] and dropped.total == 1


# ------------------------------------------------------------------------------------------------- what nothing reads

CHAT = [{"role": "user", "content": "What is <image>?"}, {"role": "assistant", "content": "4"}]


def test_columns_that_nothing_reads_are_named_once_with_their_count(tmp_path: Path) -> None:
    """Not what a path or a text of `columns` reads, nor what is empty; of tasks only what a model would be shown."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"messages": CHAT, "images": ["a.png"], "id": 1, "meta": {"tools": []}, "tool_defs": None},
        {"messages": CHAT, "images": [], "id": 2, "meta": {"tools": []}, "chat_template_kwargs": {"a": 1}},
    ]
    file.write_bytes(jsonl(*rows))
    kept, dropped = load_conversations(config(path=str(file), columns={"tools": "meta.tools"}))
    assert len(kept) == 2 and dropped.total == 0 and dropped.any
    assert dropped.describe() == "not read: id (2 rows), images (1 row)"
    dated = [{**CHAT[0], "date": "today", "name": "Ann", "score": None}, {**CHAT[1], "date": "now", "lang": "en"}]
    file.write_bytes(jsonl({"messages": dated}, {"messages": CHAT}, {"messages": dated[:1] + CHAT[1:]}))
    _, dropped = load_conversations(config(path=str(file)))
    assert dropped.describe() == "not read: messages[].date (2 rows), messages[].lang (1 row)"
    file.write_bytes(jsonl(*rows))
    (tmp_path / "stage.json").write_text("{}")
    assert not load_conversations(config(path=str(file), columns={"tools": "meta.tools"}))[1].any, "a stage's rows"
    (tmp_path / "stage.json").unlink()
    file.write_bytes(jsonl({"question": "a", "topic": "b", "gold": "c", "tools": [{"name": "f"}]}))
    _, dropped = load_tasks(config(path=str(file), columns={"prompt": "{topic}: {question}"}))
    assert dropped.describe() == "not read: tools (1 row)"
    file.write_bytes(jsonl(ROWS[0], {**ROWS[0], "completion": "", "source": "x"}))
    _, dropped = load_conversations(config(path=str(file), on_bad_row="drop"))
    assert dropped.describe().startswith("1 row dropped: ") and dropped.describe().endswith(
        "; not read: source (1 row)"
    )


def test_a_name_under_columns_that_no_format_reads_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl({"chat": CHAT, "gold": "4"}))
    mapped = config(path=str(tmp_path / "rows.jsonl"), columns={"message": "chat"})
    with pytest.raises(
        DataError, match=r"^data\.columns: 'message' is no column that whet reads; did you mean 'messages'"
    ):
        load_conversations(mapped)
    prompts, _ = load_tasks(config(path=str(tmp_path / "rows.jsonl"), columns={"prompt": "gold", "mine": "gold"}))
    assert prompts[0].columns["mine"] == "4", "rewards may read any"
