"""Examples become token rows, in batches, on all cores, once: many of them are kept in the cache and read from there.

    read -> parse -> render        this thread
    tokenize                       another, without the interpreter's lock, on as many cores as there are
    check -> append                this thread, in order

Nothing here holds more than a few batches, so a million rows take no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np

import whet
from whet.data.base import Conversation, Lazy, Origin
from whet.data.faults import BadRow, Dropped, Rejects
from whet.data.sources import Reading
from whet.data.store import Rows, Writer, kept_rows
from whet.errors import DataError, UserError
from whet.records import TokenRow
from whet.templates.base import Encoded, LossOn, Script, Template
from whet.training.gate import RowRule, check_row, token_row, write_row

BATCH = 2**20
"""Characters, or so, that are tokenized by one call: enough for all cores, and some 50 MB at work."""

SAY_S = 30.0
"""Seconds between two lines that say how far it is."""

Say = Callable[[str], None]
Example = TypeVar("Example")
Made = tuple[Encoded, Mapping[str, float]]
"""A row, and its numbers by the names of `COLUMNS` and `Making.columns`."""
COLUMNS = {"trained": "q", "shared": "q"}
"""Trained tokens of each row, and how many leading tokens it shares with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What went through the gate. Lengths are in tokens, percentiles by nearest rank."""

    rows: int
    tokens: int
    trained_tokens: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    duplicates: int
    """Rows whose tokens and mask another row before them has; nothing is done about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """Rows that may be trained on, without columns, and what became of the others."""

    rows: Sequence[TokenRow]
    """Read when they are asked for."""
    kept: Rows
    """Where they are, with the numbers of each."""
    stats: Stats

    @property
    def unread(self) -> Dropped:
        """Rows that could not be read."""
        return self.kept.dropped[0]

    @property
    def dropped(self) -> Dropped:
        """Rows that were read and cannot be trained on."""
        return self.kept.dropped[1]

    def describe(self) -> str:
        """`4,096 rows, 61,234 tokens (38,400 trained), longest 41; 2 rows dropped: ...`."""
        counted = f"{self.stats.rows:,} rows, {self.stats.tokens:,} tokens ({self.stats.trained_tokens:,} trained)"
        lost = [dropped.describe() for dropped in self.kept.dropped if dropped.any]
        return "; ".join([f"{counted}, longest {self.stats.length_max:,}", *lost, *filter(None, [self.kept.note])])


def tokenise(
    reading: Reading[Conversation],
    template: Template,
    *,
    loss_on: LossOn,
    max_length: int,
    on_bad_row: Literal["error", "drop"],
    say: Say | None = None,
) -> Gated:
    """All conversations as rows of at most `max_length` tokens, in order.

    `on_bad_row="error"`: raises `BadRow` (a `DataError`) for the first row that cannot be trained on; `"drop"`:
    leaves such rows out and keeps their places. Raises `DataError` where no row is left. `say` hears how far it is,
    where it takes long.
    """
    rule = RowRule(template=template, loss_on=loss_on, max_length=max_length, on_bad_row=on_bad_row)
    making: Making[Conversation] = Making(
        kind="conversation", asks=lambda each: [("messages", each)], makes=lambda _, rows: [(rows[0], {})]
    )
    kept = tokenised(reading, rule, making, say)
    return Gated(rows=Lazy(len(kept), partial(row_of, kept)), kept=kept, stats=_stats(kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Making(Generic[Example]):
    """How the examples of a kind become rows."""

    kind: str
    asks: Callable[[Example], Sequence[tuple[str, Conversation]]]
    """The conversations of an example, each with the field where it stood."""
    makes: Callable[[Example, Sequence[Encoded]], Iterable[Made]]
    """What becomes of their rows; may raise `BadRow`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the numbers that `makes` gives, and their type codes in `array`."""


def tokenised(reading: Reading[Example], rule: RowRule, making: Making[Example], say: Say | None = None) -> Rows:
    """The rows of all examples that pass, in order. Raises `DataError` where none is left."""

    def fill(writer: Writer) -> Sequence[Dropped]:
        rejects = Rejects(rule.on_bad_row)
        spoken = time.monotonic()
        for origin, (row, numbers) in _rows(reading.examples, rule, making, rejects):
            place = {"source": reading.sources.index(origin.source), "line": origin.line, "part": origin.part or 0}
            counts = {"trained": int(row.trained.sum()), "shared": 0}
            writer.append(row.tokens, row.trained, {**place, **counts, **numbers})
            if say is not None and time.monotonic() - spoken > SAY_S:
                spoken = time.monotonic()
                say(f"tokenizing: {origin} is done, {writer.size:,} tokens so far")
        return reading.rejects.dropped, rejects.dropped

    key = None
    if reading.digest is not None:
        key = hashlib.sha256(f"{making.kind} {reading.digest} {rule.digest}".encode()).hexdigest()[:32]
    kept = kept_rows(key, _version(), {**COLUMNS, **making.columns}, fill, reading.sources)
    if not len(kept):
        dropped = kept.dropped[1]
        raise DataError(f"nothing to train on; {dropped.describe() if dropped.total else 'the data set has no rows'}")
    return kept


def row_of(kept: Rows, index: int) -> TokenRow:
    """A row that was kept."""
    tokens, trained = kept.tokens(index)
    return token_row(Encoded(tokens=tokens, trained=trained), shared=int(kept.columns["shared"][index]))


# ---------------------------------------------------------------------------------------------- batches

Asked = tuple[Example, Sequence[tuple[str, Conversation]], Sequence[Script]]


@dataclass(slots=True)
class _Batch(Generic[Example]):
    """Examples written out; in the place of one that cannot be, why."""

    asked: list[Asked[Example] | BadRow] = field(default_factory=list)
    size: int = 0
    failure: UserError | None = None
    """Why reading ended after these."""

    @property
    def scripts(self) -> list[Script]:
        return [script for each in self.asked if not isinstance(each, BadRow) for script in each[2]]


def _rows(
    examples: Iterable[Example], rule: RowRule, making: Making[Example], rejects: Rejects
) -> Iterator[tuple[Origin, Made]]:
    """The rows of all examples in order. While a batch is tokenized, the next one is rendered."""
    waiting: deque[tuple[_Batch[Example], Future[list[Encoded | DataError]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for batch in _batches(examples, rule, making):
            waiting.append((batch, pool.submit(rule.template.encode, batch.scripts, most=rule.max_length)))
            if len(waiting) > 1:
                yield from _made(*_first(waiting), rule, making, rejects)
        while waiting:
            yield from _made(*_first(waiting), rule, making, rejects)


def _first(
    waiting: deque[tuple[_Batch[Example], Future[list[Encoded | DataError]]]],
) -> tuple[_Batch[Example], Iterator[Encoded | DataError]]:
    batch, encoded = waiting.popleft()
    return batch, iter(encoded.result())


def _batches(examples: Iterable[Example], rule: RowRule, making: Making[Example]) -> Iterator[_Batch[Example]]:
    batch: _Batch[Example] = _Batch()
    try:
        for example in examples:
            asks = making.asks(example)
            try:
                scripts = [write_row(conversation, rule) for _, conversation in asks]
            except BadRow as bad:
                batch.asked.append(bad)
                continue
            batch.asked.append((example, asks, scripts))
            batch.size += sum(len(text) for script in scripts for text, _ in script.pieces)
            if batch.size > BATCH:
                yield batch
                batch = _Batch()
    except UserError as error:
        batch.failure = error
    yield batch


def _made(
    batch: _Batch[Example],
    encoded: Iterator[Encoded | DataError],
    rule: RowRule,
    making: Making[Example],
    rejects: Rejects,
) -> Iterator[tuple[Origin, Made]]:
    for each in batch.asked:
        try:
            if isinstance(each, BadRow):
                raise each
            example, asks, scripts = each
            found = [next(encoded) for _ in scripts]
            rows = [check_row(one, asked, name, rule) for one, (name, asked) in zip(found, asks, strict=True)]
            made = list(making.makes(example, rows))
        except BadRow as bad:
            rejects.add(bad)
            continue
        for row in made:
            yield asks[0][1].origin, row
    if batch.failure is not None:
        raise batch.failure


@cache
def _version() -> str:
    """Changes with any code that has a part in it: ours, and the libraries that render and tokenize."""
    code = hashlib.sha256()
    root = Path(whet.__file__).parent
    for file in sorted(file for room in ("data", "templates", "training") for file in (root / room).rglob("*.py")):
        code.update(file.read_bytes())
    others = " ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2"))
    return f"{code.hexdigest()[:16]} {others}"


def _stats(kept: Rows) -> Stats:
    lengths = np.sort(kept.lengths)
    p50, p90, p99 = (int(lengths[-(-len(lengths) * percent // 100) - 1]) for percent in (50, 90, 99))
    return Stats(
        rows=len(kept),
        tokens=int(lengths.sum()),
        trained_tokens=int(kept.columns["trained"].sum()),
        length_p50=p50,
        length_p90=p90,
        length_p99=p99,
        length_max=int(lengths[-1]),
        duplicates=len(kept) - len(np.unique(kept.columns["checksum"])),
    )
