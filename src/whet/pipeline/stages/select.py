"""The selection stage: which of many answers, or tasks, a later stage learns from (docs/selection.md).

The filters come one after the other, each on what the ones before it left; a row that is left out is in
`dropped/data.jsonl` with the reason, and the reasons are counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from whet.config import SelectStage
from whet.config.data import listed
from whet.data.base import Answered
from whet.data.faults import Dropped, Lost, Place, kind_of
from whet.data.formats import load_answered
from whet.envs.base import Attempt, Task
from whet.errors import DataError
from whet.pipeline.generate import Chunk, Row, beside, make_rows
from whet.pipeline.load_data import rubric, tasks
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Kind, Seen, keep_dropped
from whet.records import Message
from whet.tracking.charts import ROWS_LOOK

TRIGRAMS = 3
OF_ANSWERS = ("author", "sample", "tokens", "reward", "correct")
"""Columns of a row that are of its answer, and not of the task."""
Group = Sequence[Answered]
Words = tuple[str, ...]
COMMON = 10
"""Prompts of an evaluation set from which on a run of words is its wording and no leak (GPT-3, appendix C)."""
_WORD = re.compile(r"\w+|[-+*/=^<>%]")


class Kept:
    """The rows that are left, and those that are not."""

    def __init__(self, rows: Group) -> None:
        self.rows, self.lost = list(rows), list[Lost]()

    @property
    def groups(self) -> list[list[Answered]]:
        """The rows of each prompt, in order."""
        found: dict[str, list[Answered]] = {}
        for row in self.rows:
            found.setdefault(row.key, []).append(row)
        return list(found.values())

    def keep(self, reason: str, wanted: Callable[[Answered], bool]) -> None:
        """Leave out what is not wanted."""
        told = [(row, wanted(row)) for row in self.rows]
        self.lost += [Lost(row.origin, reason, reason) for row, flag in told if not flag]
        self.rows = [row for row, flag in told if flag]

    def pick(self, reason: str, choose: Callable[[Group], Group]) -> None:
        """Leave out of each prompt's rows what is not chosen."""
        chosen = {id(row) for group in self.groups for row in choose(group)}
        self.keep(reason, lambda row: id(row) in chosen)


def run_select(context: Context[SelectStage]) -> None:
    """Grade, filter and write."""
    config = context.config
    read, unread = _read(config)

    def chunk(_: int, rows: Group) -> Chunk:
        graded, failures = _graded(context, rows)
        if 2 * len(failures) > len(rows):
            return Chunk(rows=[], metrics={}, failures=failures, candidates=len(rows))
        kept = Kept(graded)
        _filter(kept, config)
        made = list(WRITERS[config.write](kept, config))
        lost = Dropped(tuple(kept.lost))
        keep_dropped(context, "data", [*unread, lost])
        counts = "; ".join(f"{count:,} {reason}" for reason, count in lost.counts.items()) or "none"
        if not made:
            raise DataError(f"{context.name}: nothing is left of {len(rows):,} rows: {counts}; loosen what took most")
        context.console.say(f"{context.name}: left out of {len(rows):,} rows: {counts}")
        metrics = {f"left_out/{reason.replace(' ', '_')}": float(count) for reason, count in lost.counts.items()}
        return Chunk(rows=made, metrics=metrics)

    make_rows(context, read, len(read), chunk, of="rows")


def _read(config: SelectStage) -> tuple[list[Answered], list[Dropped]]:
    found = [load_answered(source) for source in config.sources]
    return [row for rows, _ in found for row in rows], [dropped for _, dropped in found]


# ------------------------------------------------------------------------------------------------ grades


def _graded(context: Context[SelectStage], rows: Group) -> tuple[list[Answered], list[str]]:
    """The rows with `reward`, `correct` and `solved` among their columns, and why some could not be graded."""
    config, failures, shares = context.config, list[str](), dict[str, list[float]]()
    if config.rewards:
        rows, failures = _scored(context, rows)
    asked = {
        "reward": not config.rewards and (config.best or config.min_reward is not None or config.write == "pairs"),
        "correct": not config.rewards and config.correct is not None,
        "solved": False,
    }
    graded = []
    for row in rows:
        found = {name: _grade(row, name, bool(needed)) for name, needed in asked.items()}
        known = [found[name] for name in ("solved", "correct") if found[name] is not None]
        shares.setdefault(row.key, []).extend(map(float, known[:1]))
        graded.append(replace(row, columns={**row.columns, **found}))
    solved = {key: fmean(values) for key, values in shares.items() if values}
    return [replace(row, columns={**row.columns, "solved": solved.get(row.key)}) for row in graded], failures


def _grade(row: Answered, name: str, needed: bool) -> Any:
    """A column with a grade; None where it has none. Raises `BadRow` where one is needed."""
    value = row.columns.get(name)
    if isinstance(value, bool) if name == "correct" else isinstance(value, float | int) and abs(value) < math.inf:
        return value
    if needed:
        remedy = f"it is {kind_of(value)}; give the stage rewards, or the one that made the rows"
        raise Place(row.origin)[name].bad("not true or false" if name == "correct" else "not a number", remedy)
    return None


def _scored(context: Context[SelectStage], rows: Group) -> tuple[list[Answered], list[str]]:
    """The rows with the scores that the stage's rewards give them."""
    names = {row.key: str(row.origin) for row in reversed(rows)}  # answers to one prompt are compared as a group
    attempts = []
    for row in rows:
        if row.answer is None:
            raise Place(row.origin)["completion"].bad("no answer to grade", "leave rewards out, or the row")
        task = Task(id=names[row.key], messages=row.prompt, columns=row.columns)
        attempts.append(Attempt(task=task, messages=(row.answer,)))
    with closing(rubric(context.config.sources[0], context.config.rewards, context.world)) as grading:
        grading.check([attempt.task for attempt in attempts])
        scores = grading.score(attempts, step=1)
    graded = [
        replace(row, columns={**row.columns, "reward": score.value, "correct": score.correct, "solved": None})
        for row, score in zip(rows, scores, strict=True)
    ]
    return graded, [score.note for score in scores if score.value is None]


# ----------------------------------------------------------------------------------------------- filters


def _filter(kept: Kept, config: SelectStage) -> None:
    """Leave out what the keys of the recipe say, in their order."""
    if config.write != "tasks":
        kept.keep("without an answer", lambda row: row.answer is not None)
    if config.rewards:
        kept.keep("not graded", lambda row: row.columns["reward"] is not None)
    if grams := leaks((_texts(task.messages) for task in _held_out(config)), config.ngram):
        kept.keep("shared with an evaluation set", lambda row: not _leaked(row, config.ngram, grams))
    if config.difficulty is not None:
        low, high = config.difficulty
        kept.keep("of unknown difficulty", lambda row: row.columns["solved"] is not None)
        kept.keep("too hard", lambda row: row.columns["solved"] >= low)
        kept.keep("too easy", lambda row: row.columns["solved"] <= high)
    if config.correct is not None and config.write != "pairs":
        kept.keep("wrong" if config.correct else "right", lambda row: row.columns["correct"] is config.correct)
    if (least := config.min_reward) is not None:
        kept.keep("below min_reward", lambda row: row.columns["reward"] >= least)
    if config.write != "tasks" and config.max_similarity is not None:
        kept.pick("too similar to another", partial(_different, limit=config.max_similarity))
    if config.write == "answers" and config.best is not None:
        kept.pick("not among the best", lambda group: _ranked(group)[: config.best])


def _held_out(config: SelectStage) -> Iterator[Task]:
    for source in () if config.decontaminate is None else listed(config.decontaminate):
        yield from tasks(source)[0]


def _texts(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role not in ("system", "developer")]


def _leaked(row: Answered, n: int, grams: set[Words]) -> bool:
    return any(ngrams(text, n) & grams for text in (*_texts(row.prompt), row.text))


def _ranked(group: Group) -> list[Answered]:
    """The highest rewards first, equal ones as they came."""
    return sorted(group, key=lambda row: -(row.columns.get("reward") or 0.0))


def _different(group: Group, limit: float) -> list[Answered]:
    """Those that are not too similar to a better one."""
    chosen: dict[str, tuple[Answered, set[Words]]] = {}
    for row in _ranked(group):
        grams = ngrams(row.text, TRIGRAMS)
        if row.text not in chosen and all(jaccard(grams, other) <= limit for _, other in chosen.values()):
            chosen[row.text] = row, grams
    return [row for row, _ in chosen.values()]


# ----------------------------------------------------------------------------------------------- writing


def _base(row: Answered) -> dict[str, Any]:
    columns = {name: value for name, value in beside(row.columns).items() if value is not None}
    return {"task": str(row.origin), **columns, "prompt": [message.as_dict() for message in row.prompt]}


def _answers(kept: Kept, config: SelectStage) -> Iterator[Row]:
    for row in kept.rows:
        yield _base(row) | {"completion": _said(row)}


def _tasks(kept: Kept, config: SelectStage) -> Iterator[Row]:
    for first, *_ in kept.groups:
        yield {name: value for name, value in _base(first).items() if name not in OF_ANSWERS}


def _pairs(kept: Kept, config: SelectStage) -> Iterator[Row]:
    """Of each prompt the best answer over the worst, the second best over the second worst, and so on."""
    found: list[tuple[Answered, Answered]] = []
    for ranked in map(_ranked, kept.groups):
        for better, worse in list(zip(ranked, ranked[::-1], strict=True))[: min(config.best or 1, len(ranked) // 2)]:
            right = not config.correct or (better.columns["correct"] is True and worse.columns["correct"] is False)
            if right and better.columns["reward"] > worse.columns["reward"]:
                found.append((better, worse))
    used = {id(row) for pair in found for row in pair}
    kept.keep("not in a pair", lambda row: id(row) in used)
    for better, worse in found:
        row = {name: value for name, value in _base(better).items() if name not in OF_ANSWERS}
        scores = {"chosen_score": better.columns["reward"], "rejected_score": worse.columns["reward"]}
        yield row | {"chosen": _said(better), "rejected": _said(worse)} | scores


def _said(row: Answered) -> list[dict[str, Any]]:
    return [] if row.answer is None else [row.answer.as_dict()]


WRITERS: Mapping[str, Callable[[Kept, SelectStage], Iterator[Row]]] = {
    "answers": _answers,
    "pairs": _pairs,
    "tasks": _tasks,
}
"""`write`: what makes rows of what is left."""


def check_select(context: Context[SelectStage]) -> Seen:
    """Its rows, and the sets that must not be among them."""
    read, unread = _read(context.config)
    parts = [f"{len(read):,} rows", *(d.describe() for d in unread if d.total)]
    if context.config.decontaminate is not None:
        parts.append(f"{len(list(_held_out(context.config))):,} held-out tasks")
    return Seen(summary="; ".join(parts), prompts=[Task(id="", messages=row.prompt) for row in read[:SHOWN]])


# ------------------------------------------------- how much texts have in common, by their words


def words(text: str) -> Words:
    """Its words and operators in lower case, without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def ngrams(text: str, n: int) -> set[Words]:
    """Its runs of n words; of a text with fewer the whole."""
    found = words(text)
    return {found[i : i + n] for i in range(max(1, len(found) - n + 1))} if found else set()


def jaccard(first: set[Words], second: set[Words]) -> float:
    """Shared n-grams over all n-grams, from 0 to 1; 1 for two empty sets."""
    return len(first & second) / len(first | second) if first | second else 1.0


def leaks(held_out: Iterable[Sequence[str]], n: int) -> set[Words]:
    """The n-grams by which the prompts of an evaluation set (each the texts of its messages) are known again.

    Those that more than `COMMON` different prompts share are their instruction, and tell nothing.
    """
    counts = Counter(gram for texts in set(map(tuple, held_out)) for gram in {g for t in texts for g in ngrams(t, n)})
    return {gram for gram, count in counts.items() if count <= COMMON}


KIND = Kind(config=SelectStage, run=run_select, check=check_select, needs=lambda config: None, look=ROWS_LOOK)
