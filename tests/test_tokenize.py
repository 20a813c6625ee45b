"""From examples to rows: batches change nothing, what is kept is what was made, and what is wrong with it is said."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from whet.config import DataConfig
from whet.data import store
from whet.data.base import Conversation, Origin
from whet.data.faults import BadRow, Rejects
from whet.data.formats import read_conversations
from whet.data.sources import Reading
from whet.data.store import DROPPED, TOKENS
from whet.errors import DataError, RunError
from whet.models.create import byte_tokenizer
from whet.records import Message, TokenRow
from whet.templates import JinjaTemplate
from whet.templates.base import Encoded, LossOn, Script
from whet.templates.messages import Encoder
from whet.training import tokenize
from whet.training.gate import RowRule, check_row, write_row
from whet.training.tokenize import Gated, tokenise

TEXTS = [f"What is {n} and {n + 1}?" * (n % 7 + 1) for n in range(60)]
LONG = {"prompt": "x", "completion": "y" * 500}


@pytest.fixture(scope="module")
def template() -> JinjaTemplate:
    return JinjaTemplate(byte_tokenizer())


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 60 rows, two of which are bad; 100 tokens are many, and the cache is a folder of the test's own."""
    monkeypatch.setattr(store, "KEPT_TOKENS", 100)
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    listed: list[Any] = [{"prompt": text, "completion": str(n)} for n, text in enumerate(TEXTS)]
    listed[10], listed[20], listed[30] = LONG, {"prompt": "x", "completion": ""}, {**listed[30], "id": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    return path


def read(path: Path, template: JinjaTemplate, loss_on: LossOn = "assistant", **changes: Any) -> Gated:
    data = DataConfig(path=str(path), **{"on_bad_row": "drop", **changes})
    return tokenise(read_conversations(data), template, loss_on=loss_on, max_length=400, on_bad_row=data.on_bad_row)


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "rows").iterdir()) if (tmp_path / "cache").exists() else []


def same(left: Gated, right: Gated, rows: Sequence[TokenRow] | None = None) -> bool:
    """`rows`: those of the left, read before their file was damaged."""
    assert left.stats == right.stats and left.kept.dropped == right.kept.dropped
    places = range(len(left.rows))
    assert [left.kept.origin(i) for i in places] == [right.kept.origin(i) for i in places]
    return list(rows or left.rows) == list(right.rows)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
@pytest.mark.parametrize("batch", [1, 200, 2**20])
def test_batches_change_nothing(
    template: JinjaTemplate, loss_on: LossOn, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "BATCH", batch)
    talks = [
        Conversation(
            origin=Origin(source="a", line=line),
            messages=(
                Message(role="user", content=text),
                Message(role="assistant", content=text[::-1]),
                Message(role="user", content="und süß?"),
                Message(role="assistant", content="👋"),
            ),
        )
        for line, text in enumerate(TEXTS, start=1)
    ]
    texts = [Conversation(origin=Origin(source="b", line=line), text=text) for line, text in enumerate(TEXTS)]
    mixed = [each for pair in zip(talks, texts, strict=True) for each in pair]
    reading = Reading(examples=mixed, rejects=Rejects("error"), sources=["a", "b"])
    gated = tokenise(reading, template, loss_on=loss_on, max_length=2000, on_bad_row="error")
    for index, (each, row) in enumerate(zip(mixed, gated.rows, strict=True)):
        if each.text is not None:
            alone = template.text(each.text)
        else:
            alone = template.conversation(each.messages, loss_on=loss_on)
        assert (tuple(row.tokens.tolist()), tuple(row.trained.tolist())) == (alone.tokens, alone.trained)
        assert gated.kept.origin(index) == each.origin


@pytest.mark.parametrize("batch", [1, 150, 2**20])
@pytest.mark.parametrize("order", [["{", "long", "empty"], ["long", "{", "empty"], ["empty", "long", "{"]])
def test_the_first_bad_row_is_named_whatever_is_wrong_with_it(
    rows: Path, template: JinjaTemplate, batch: int, order: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "BATCH", batch)
    kinds = {"{": "{broken", "long": json.dumps(LONG), "empty": json.dumps({"prompt": "<|im_end|>", "completion": "a"})}
    good = [json.dumps({"prompt": text, "completion": "a"}) for text in TEXTS]
    lines = [*good[:5], kinds[order[0]], *good[5:9], kinds[order[1]], kinds[order[2]], *good[9:]]
    rows.write_text("\n".join(lines) + "\n")
    with pytest.raises(BadRow, match=r"rows\.jsonl:6: "):
        read(rows, template, on_bad_row="error")
    gated = read(rows, template)
    assert gated.stats.rows == 60 and gated.unread.total == 1 and gated.dropped.total == 2


def test_processes_change_nothing(
    rows: Path, template: JinjaTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = read(rows, template)
    (left,) = folders(tmp_path)
    left = left.rename(tmp_path / "alone")
    monkeypatch.setattr(tokenize, "SHARED_BYTES", 0)
    monkeypatch.setattr(tokenize, "BATCH", 150)
    monkeypatch.setattr(tokenize, "cores", lambda: 3)
    assert same(alone, read(rows, template), list(alone.rows))
    (right,) = folders(tmp_path)
    assert alone.dropped.total == alone.unread.total == 1 and alone.unread.unread == {"id": 1}
    assert all((left / name).read_bytes() == (right / name).read_bytes() for name in (TOKENS, DROPPED))
    good = rows.read_text().splitlines(keepends=True)[:10]
    for bad, what in {json.dumps(LONG): "messages: longer than max_length 400", "{broken": "not valid JSON"}.items():
        rows.write_text("".join([*good, bad, "\n", *good, "{damaged too"]))
        with pytest.raises(BadRow, match=rf"rows\.jsonl:11: {what}"):
            read(rows, template, on_bad_row="error")


def test_processes_read_a_saved_data_set(
    rows: Path, template: JinjaTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [json.loads(line) for line in rows.read_text().splitlines()]
    datasets.Dataset.from_list(listed).save_to_disk(tmp_path / "saved")
    alone = read(tmp_path / "saved", template)
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(tokenize, "SHARED_BYTES", 0)
    monkeypatch.setattr(tokenize, "BATCH", 150)
    asked: list[int] = []
    monkeypatch.setattr(tokenize, "cores", lambda: asked.append(2) or 2)
    assert same(alone, read(tmp_path / "saved", template)) and asked == [2]


def test_who_waits_hears_how_far_it_is(rows: Path, template: JinjaTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "SAY_S", -1.0)
    said: list[str] = []
    data = DataConfig(path=str(rows), on_bad_row="drop")
    settings: dict[str, Any] = {"loss_on": "assistant", "max_length": 400, "on_bad_row": "drop", "say": said.append}
    made = tokenise(read_conversations(data), template, **settings)
    assert len(said) == len(made.rows) == 58
    assert said[-1] == f"tokenizing: {rows}:60 is done, {made.stats.tokens:,} tokens so far"
    said.clear()
    tokenise(read_conversations(data), template, **settings)
    assert not said, "what is kept is not made again"


def test_a_row_far_too_long_is_known_before_much_of_it_is_tokenized(
    template: JinjaTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Encoder.one

    def counting(self: Encoder, text: str) -> list[int]:
        seen.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Encoder, "one", counting)
    monkeypatch.setattr(Encoder, "_texts", lambda _, texts, **__: seen.extend(map(len, texts)) or [])
    long = Conversation(
        origin=Origin(source="a", line=3),
        messages=(Message(role="user", content="a b " * 5_000_000), Message(role="assistant", content="c")),
    )
    rule = RowRule(template=template, max_length=1000)
    seen.clear()
    (encoded,) = template.encode([write_row(long, rule)], most=rule.max_length)
    with pytest.raises(BadRow, match=r"^a:3: messages: longer than max_length 1000; it has more than 2000; raise"):
        check_row(encoded, long, "messages", rule)
    assert sum(seen) < 200_000


def test_a_long_text_of_few_tokens_is_not_taken_for_too_long(template: JinjaTemplate) -> None:
    """The markup of chat is one token for many characters: the most that a text can be longer than its tokens."""
    script = Script((("<|endoftext|>" * 30_000, True),))
    (encoded,) = template.encode([script], most=20_000)
    assert isinstance(encoded, Encoded) and len(encoded.tokens) == 30_000, "at most twice as many: counted to the end"
    (refused,) = template.encode([script], most=10_000)
    assert isinstance(refused, DataError)


# -------------------------------------------------------------------------------------------------- cache


def test_what_is_kept_is_what_was_made_and_is_not_made_again(
    rows: Path, template: JinjaTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = read(rows, template)
    (folder,) = folders(tmp_path)
    assert made.kept.note == f"kept in {folder}" and made.kept.note in made.describe()
    monkeypatch.setattr(JinjaTemplate, "encode", lambda *_, **__: pytest.fail("tokenized again"))
    again = read(rows, template)
    assert again.kept.note == f"read from {folder}" and same(made, again)
    assert str(again.dropped.rows[0]).startswith(f"{rows}:11: messages: longer than max_length 400")
    assert str(again.unread.rows[0]).startswith(f"{rows}:21: completion: empty text")
    assert again.unread.unread == {"id": 1}
    moved = rows.rename(tmp_path / "moved.jsonl")
    assert str(read(moved, template).kept.origin(0)) == f"{moved}:1", "known by its content, named by its place"


def test_few_rows_leave_nothing_on_the_disk(
    rows: Path, template: JinjaTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = read(rows, template)
    monkeypatch.setattr(store, "KEPT_TOKENS", 10**6)
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "other"))
    few = read(rows, template)
    assert not (tmp_path / "other").exists() and few.kept.note == "" and same(many, few)


OTHERS: dict[str, dict[str, Any]] = {
    "mask": {"loss_on": "all"},
    "bad rows": {"on_bad_row": "error", "limit": 5},
    "system": {"system": "Be brief."},
    "columns": {"columns": {"prompt": "{prompt}!"}},
}


@pytest.mark.parametrize("kind", [*OTHERS, "content", "template"])
def test_what_would_be_made_otherwise_is_made(rows: Path, template: JinjaTemplate, tmp_path: Path, kind: str) -> None:
    read(rows, template)
    if kind == "content":
        rows.write_text(rows.read_text().replace("59", "58"))
    if kind == "template":
        tokenizer = byte_tokenizer()
        template = JinjaTemplate(tokenizer, chat_template="{{- '' }}" + tokenizer.chat_template)
    other = read(rows, template, **OTHERS.get(kind, {}))
    assert "read from" not in other.kept.note and len(folders(tmp_path)) == 2


def damage(folder: Path, kind: str) -> None:
    path = folder / {"columns": store.COLUMNS, "dropped": store.DROPPED}.get(kind, store.TOKENS)
    data = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "version":
        manifest = json.loads((folder / "manifest.json").read_text())
        store.seal(folder, {"version": "older", "left_out_by": manifest["left_out_by"]})
    else:
        path.write_bytes(data[:-8] if kind == "short" else b"\0" + data[1:])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("short", r"tokens\.i32: cut short or grown; it has [\d,]+ of [\d,]+ bytes"),
        ("gone", r"tokens\.i32: missing"),
        ("columns", r"columns\.npz: damaged"),
        ("dropped", r"dropped\.jsonl: damaged"),
        ("version", "another version of whet or of its tokenizers made it"),
    ],
)
def test_what_is_not_usable_is_made_again_and_said(
    rows: Path, template: JinjaTemplate, tmp_path: Path, kind: str, why: str
) -> None:
    made = read(rows, template)
    before = list(made.rows)
    (folder,) = folders(tmp_path)
    damage(folder, kind)
    again = read(rows, template)
    assert same(made, again, before)
    assert f"kept in {folder}; made again, since what was kept is not usable (" in again.kept.note
    assert re.search(why, again.kept.note)
    assert read(rows, template).kept.note == f"read from {folder}"


def test_a_flipped_bit_is_noticed_when_its_row_is_read(rows: Path, template: JinjaTemplate, tmp_path: Path) -> None:
    made = read(rows, template)
    before = list(made.rows)
    (folder,) = folders(tmp_path)
    whole = (folder / store.TOKENS).read_bytes()
    for place in np.random.default_rng(0).integers(len(whole), size=20):
        (folder / store.TOKENS).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        opened = read(rows, template)
        struck = int(np.searchsorted(made.kept.columns["end"], place // 4, side="right"))
        assert all(opened.rows[index] == before[index] for index in range(len(before)) if index != struck)
        with pytest.raises(RunError, match=r"tokens\.i32: damaged; give the same command again"):
            opened.rows[struck]
        assert "made again" in read(rows, template).kept.note


def test_a_full_disk_is_said_and_nothing_is_left(
    rows: Path, template: JinjaTemplate, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(RunError, match=r"cache/rows/.*the disk is full: .* name a folder on another disk in WHET_"):
            read(rows, template)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folders(tmp_path) == []
    assert read(rows, template).kept.note.startswith("kept in")


def test_a_cache_that_may_not_be_written_is_said(
    rows: Path, template: JinjaTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RunError, match=r"cannot be written .* name a folder on another disk in WHET_CACHE"):
        read(rows, template)


def test_two_processes_may_make_the_same_rows(
    rows: Path, template: JinjaTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within: list[Gated] = []
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        within.append(read(rows, template))  # another process is done while this one is about to be
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    made = read(rows, template)
    assert same(made, within[0])
    assert len(folders(tmp_path)) == 1, "one copy, and no part of another"


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    rows: Path, template: JinjaTemplate, tmp_path: Path
) -> None:
    made = read(rows, template)
    (folder,) = folders(tmp_path)
    left, held = (folder.with_name(f"{folder.name}.{name}.part") for name in ("left", "held"))
    for part in (left, held):
        part.mkdir()
        os.utime(part, (0, 0))
    handle = store._hold(held)
    assert handle is not None
    folder.rename(tmp_path / "aside")
    assert same(made, read(rows, template))
    assert folders(tmp_path) == [folder, held]
    os.close(handle)
