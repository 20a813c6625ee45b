"""Conversations become token rows, in batches, on all cores, once: many are kept in the cache and read from there.

    read -> parse -> render -> tokenize -> check    forks of this process, each every nth batch of a large file
    append                                          this process, in order

Nothing here holds more than a few batches, so a million rows take no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

import whet
from whet.data.base import Conversation, Lazy
from whet.data.faults import BadRow, Dropped, Rejects
from whet.data.sources import Reading
from whet.data.store import Rows, Writer, coded, kept_rows
from whet.errors import DataError, UserError
from whet.records import TokenRow
from whet.templates.base import Encoded, LossOn, Script, Template
from whet.training.crew import cores, in_turns
from whet.training.gate import RowRule, check_row, token_row, write_row

BATCH = 2**18
"""Characters, or so, that are tokenized by one call: some 12 MB at work."""

SHARED_BYTES = 2**22
"""Bytes of files from which on processes share the work: with fewer they would not be worth their start."""

SAY_S = 30.0
"""Seconds between two lines that say how far it is."""

Say = Callable[[str], None]
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
    count = cores() if reading.bytes > SHARED_BYTES else 1

    def fill(writer: Writer) -> Sequence[Dropped]:
        rejects, spoken = Rejects(rule.on_bad_row), time.monotonic()
        part = _Part()
        with closing(in_turns(partial(_parts, reading, rule), count)) as parts:
            for part in parts:
                for each in part.rows:
                    if isinstance(each, BadRow):
                        rejects.add(each)
                        continue
                    writer.append(*each)
                    if say is not None and time.monotonic() - spoken > SAY_S:
                        spoken = time.monotonic()
                        place = f"{reading.sources[int(each[1]['source'])]}:{each[1]['line']}"
                        say(f"tokenizing: {place} is done, {writer.size:,} tokens so far")
                if part.failure is not None:
                    raise part.failure
        assert part.unread is not None, "the last part has it"
        return part.unread, rejects.dropped

    key = None
    if reading.digest is not None:
        key = hashlib.sha256(f"conversation {reading.digest} {rule.digest}".encode()).hexdigest()[:32]
    kept = kept_rows(key, _version(), COLUMNS, fill, reading.sources)
    if not len(kept):
        dropped = kept.dropped[1]
        raise DataError(f"nothing to train on; {dropped.describe() if dropped.total else 'the data set has no rows'}")
    return Gated(rows=Lazy(len(kept), partial(row_of, kept)), kept=kept, stats=_stats(kept))


def row_of(kept: Rows, index: int) -> TokenRow:
    """A row that was kept."""
    tokens, trained = kept.tokens(index)
    return token_row(Encoded(tokens=tokens, trained=trained), shared=int(kept.columns["shared"][index]))


# ---------------------------------------------------------------------------------------------- batches


@dataclass(slots=True)
class _Part:
    """A batch of conversations, in order, and what became of them."""

    rows: list[tuple[bytes, Mapping[str, float]] | BadRow] = field(default_factory=list)
    """Tokens and numbers as they are kept; in the place of a row that cannot be trained on, why."""
    failure: UserError | None = None
    """Why reading ended after these."""
    unread: Dropped | None = None
    """In the last part: what could not be read of all of it."""


def _parts(reading: Reading[Conversation], rule: RowRule, first: int, step: int) -> Iterator[_Part]:
    """Every `step`th part from the first on."""
    for batch, part in islice(_batches(reading), first, None, step):
        part.rows = list(_rows(batch, rule, reading.sources))
        yield part


def _batches(reading: Reading[Conversation]) -> Iterator[tuple[list[Conversation], _Part]]:
    batch, size, failure = list[Conversation](), 0, None
    try:
        for each in reading.examples:
            batch.append(each)
            size += len(each.text or "") + sum(len(m.content) + len(m.thinking or "") for m in each.messages)
            if size > BATCH:
                yield batch, _Part()
                batch, size = [], 0
    except UserError as error:
        failure = error
    yield batch, _Part(failure=failure, unread=reading.rejects.dropped)


def _rows(
    batch: Sequence[Conversation], rule: RowRule, sources: Sequence[str]
) -> Iterator[tuple[bytes, Mapping[str, float]] | BadRow]:
    written = [_written(each, rule) for each in batch]
    encoded = iter(rule.template.encode([each for each in written if isinstance(each, Script)], most=rule.max_length))
    for each, script in zip(batch, written, strict=True):
        if isinstance(script, BadRow):
            yield script
            continue
        try:
            row = check_row(next(encoded), each, "messages", rule)
        except BadRow as bad:
            yield bad
            continue
        place = {"source": sources.index(each.origin.source), "line": each.origin.line, "part": each.origin.part or 0}
        yield coded(row.tokens, row.trained), {**place, "trained": int(row.trained.sum()), "shared": 0}


def _written(conversation: Conversation, rule: RowRule) -> Script | BadRow:
    try:
        return write_row(conversation, rule)
    except BadRow as bad:
        return bad


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
