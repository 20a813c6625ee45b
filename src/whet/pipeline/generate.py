"""Making rows: chunk by chunk, each kept before the next is begun, and one file of rows at the end.

A chunk's rows depend on its number and its tasks alone, so a stage that was killed goes on after the last whole chunk
as if it had never stopped. Stages that ask a judge about comparisons show their first questions (`questions_seen`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from whet.config.judge import JudgeWording
from whet.data.base import Comparison
from whet.data.formats import TAKEN
from whet.data.strict import check_text
from whet.envs.base import Task
from whet.envs.judges.judge import build_wording
from whet.envs.judges.questions import questions
from whet.errors import DataError, RewardError
from whet.files import read_json, write_atomic, write_json
from whet.pipeline.load_data import comparisons
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import ROWS, Context, Interrupted, Seen, keep_dropped
from whet.records import Group, Message
from whet.templates.base import Template
from whet.tracking.log import Decode, RunLog

Item = TypeVar("Item")
Row = Mapping[str, Any]
Counts = defaultdict[str, float]
"""What happened to the candidates of a chunk, under the names of its metrics: `Counts(float)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What came of one chunk."""

    rows: Sequence[Row]
    metrics: Mapping[str, float]
    groups: tuple[Group, ...] = ()
    """Episodes that were played for it."""
    failures: Sequence[str] = ()
    """Why candidates could not be judged or written, one entry each."""
    unread: int = 0
    """How many of those were answered with words that are no verdict: an outcome, unless there is no other."""
    candidates: int = 0
    """How many there were. Where most of them failed the stage stops, and keeps nothing of the chunk, nor of those just
    before it in which anything failed: they are tried again when the stage goes on."""


def make_rows(
    context: Context,
    items: Sequence[Item],
    size: int,
    make: Callable[[int, Sequence[Item]], Chunk],
    *,
    decode: Decode | None = None,
    of: str = "tasks",
) -> None:
    """Write `rows.jsonl` from what `make(number, items)` makes of each chunk, numbered from 1; `of`: what items are.

    Raises `RewardError` where most of a chunk could not be judged, `DataError` where no row came of all of them.
    """
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    parts = [context.checkpoints / f"rows-{number:06d}.json" for number in range(1, len(chunks) + 1)]
    done = next((i for i, part in enumerate(parts) if not part.exists()), len(parts))
    if done:
        context.console.say(f"{context.name}: continues after chunk {done}")
    log = RunLog(context.folder, decode)
    log.truncate(done)
    context.console.begin(context.name, len(chunks), done=done)
    for number, chunk in enumerate(chunks[done:], start=done + 1):
        context.world.reseed(context.seed)
        made = make(number, chunk)
        if 2 * (len(made.failures) - made.unread) > made.candidates or 0 < len(made.failures) == made.candidates:
            _take_back(parts[: number - 1])
            raise RewardError(
                f"{context.name}: most of chunk {number} of {len(chunks)} could not be judged; {made.failures[0]}; "
                "what was made before is kept, and the same command goes on"
            )
        rows = [row for row in made.rows if _readable(row)]
        lost = float(len(made.rows) - len(rows))
        metrics = {"rows": float(len(rows)), "rows/unreadable": lost, **made.metrics}
        log.write(number, metrics, made.groups)
        log.sync()
        write_json(parts[number - 1], {"rows": rows, "failed": len(made.failures)})
        for sink in context.sinks:
            sink.log(context.name, number, metrics, made.groups)
        if context.stopped() and number < len(chunks):
            raise Interrupted
    log.close()
    context.console.close()
    rows = [row for part in parts for row in read_json(part)["rows"]]
    if not rows:
        raise DataError(f"{context.name}: not one row came of {len(items):,} {of}; see {context.folder}/metrics.jsonl")
    write_atomic(context.folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    context.console.say(f"{context.name}: {len(rows):,} rows of {len(items):,} {of} in {context.folder / ROWS}")


def _take_back(parts: Sequence[Path]) -> None:
    """Remove the last chunks in which anything failed: a judge that is gone by now may have gone while they were made.

    They are made again when the stage goes on, as they would have been; what was answered is not asked again.
    """
    for part in reversed(parts):
        if not read_json(part)["failed"]:
            return
        part.unlink()


def beside(columns: Row) -> dict[str, Any]:
    """What a row that is made keeps of its task's: what JSON can say, and no column that tells what a row is."""
    return {key: value for key, value in columns.items() if key not in TAKEN and _in_json(value)}


def _in_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def writable(template: Template, asked: Sequence[Message], answer: str) -> bool:
    """Whether a later stage can read this answer: it says something, and no special token in plain letters."""
    if not answer.strip():
        return False
    try:
        template.conversation([*asked, Message(role="assistant", content=answer)])
    except DataError:
        return False
    return True


def _readable(row: Row) -> bool:
    """Whether the loaders take its text: what a model wrote may hold characters that they refuse in a file."""
    try:
        check_text(dict(row))
    except ValueError:
        return False
    return True


def comparisons_of(context: Context[Any]) -> Sequence[Comparison]:
    """The comparisons of a stage, with what became of the other rows told and noted."""
    listed, unread = comparisons(context.config.data)
    lost = f"; {unread.describe()}" if unread.any else ""
    context.console.say(f"{context.name}: {len(listed):,} comparisons{lost}")
    keep_dropped(context, "data", [unread])
    return listed


def questions_seen(context: Context[Any], wording: JudgeWording, form: Literal["pairs", "points"]) -> Seen:
    """The comparisons of a stage, and the first of the questions about them."""
    compared, unread = comparisons(context.config.data)
    known = list(questions(compared[0], build_wording(wording), form=form, reasoning=wording.reasoning))
    summary = f"{len(compared):,} comparisons; {unread.describe()}"
    return Seen(summary=summary, prompts=[Task(id="", messages=each.prompt) for each in known[:SHOWN]])
