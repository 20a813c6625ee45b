"""The selection stage: which of many answers, or tasks, a later stage learns from (docs/selection.md).

The filters come one after the other, each on what the ones before it left; a row that is left out is in
`dropped/data.jsonl` with the reason, and the reasons are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from whet.config import DataConfig, SelectStage
from whet.config.data import listed
from whet.data.base import Answered
from whet.data.faults import Dropped, Lost, Place, finite
from whet.data.formats import load_answered
from whet.data.similar import Words, jaccard, leaks, ngrams
from whet.envs.base import Attempt, Task
from whet.errors import DataError
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.generate import Chunk, Row, beside, make_rows
from whet.pipeline.load_data import rubric, tasks
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Kind, Seen
from whet.records import Message
from whet.tracking.charts import Look

TRIGRAMS = 3
OF_ANSWERS = ("author", "sample", "tokens", "reward", "correct")
"""Columns of a row that are of its answer, and not of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A row with its grade."""

    row: Answered
    key: str
    """The prompt: equal for answers to the same one."""
    reward: float | None
    correct: bool | None
    solved: float | None = None
    """The share of right answers to its prompt."""
    note: str = ""
    """Why it has no grade."""

    @property
    def text(self) -> str:
        """What was answered; empty where nothing was."""
        return "" if self.row.answer is None else self.row.answer.content

    @property
    def grades(self) -> dict[str, Any]:
        """The columns of its grades."""
        known = {"reward": self.reward, "correct": self.correct, "solved": self.solved}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(slots=True)
class Kept:
    """The answers that are left, and those that are not."""

    answers: list[Answer]
    lost: list[Lost] = field(default_factory=list)

    @property
    def groups(self) -> list[list[Answer]]:
        """The answers of each prompt, in order."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.key, []).append(answer)
        return list(found.values())

    def keep(self, reason: str, wanted: Callable[[Answer], bool]) -> None:
        """Leave out what is not wanted."""
        flags = [wanted(answer) for answer in self.answers]
        self.lost += [
            Lost(a.row.origin, reason, reason) for a, flag in zip(self.answers, flags, strict=True) if not flag
        ]
        self.answers = [answer for answer, flag in zip(self.answers, flags, strict=True) if flag]

    def pick(self, reason: str, choose: Callable[[Sequence[Answer]], Sequence[Answer]]) -> None:
        """Leave out of each prompt's answers what is not chosen."""
        chosen = {id(answer) for group in self.groups for answer in choose(group)}
        self.keep(reason, lambda answer: id(answer) in chosen)

    def describe(self) -> str:
        """`1,024 wrong; 31 too similar to another`, in the order of the filters."""
        counts = Dropped(tuple(self.lost)).counts
        return "; ".join(f"{count:,} {reason}" for reason, count in counts.items())


def run_select(context: Context[SelectStage]) -> None:
    """Grade, filter and write."""
    config = context.config
    read, unread = _read(config)
    grams = leaks((_texts(task.messages) for task in _held_out(config)), config.ngram)

    def chunk(_: int, rows: Sequence[Answered]) -> Chunk:
        kept = Kept(_graded(context, rows))
        failures = [answer.note for answer in kept.answers if config.rewards and answer.reward is None]
        if 2 * len(failures) > len(rows):
            return Chunk(rows=[], metrics={}, failures=failures, candidates=len(rows))
        _filter(kept, config, grams)
        made = list(_WRITERS[config.write](kept, config))
        keep_dropped(context, "data", [*unread, Dropped(tuple(kept.lost))])
        if not made:
            why = f"{kept.describe()}; loosen what took most of them"
            raise DataError(f"{context.name}: nothing is left of {len(rows):,} rows: {why}")
        context.console.say(f"{context.name}: of {len(rows):,} rows left out: {kept.describe() or 'none'}")
        counts = Dropped(tuple(kept.lost)).counts
        return Chunk(rows=made, metrics={f"left_out/{why.replace(' ', '_')}": float(n) for why, n in counts.items()})

    make_rows(context, read, len(read), chunk)


def _read(config: SelectStage) -> tuple[list[Answered], list[Dropped]]:
    found = [load_answered(source) for source in listed(config.data) if isinstance(source, DataConfig)]
    return [row for rows, _ in found for row in rows], [dropped for _, dropped in found]


def _held_out(config: SelectStage) -> Iterator[Task]:
    for source in () if config.decontaminate is None else listed(config.decontaminate):
        yield from tasks(source)[0]


def _texts(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role not in ("system", "developer")]


# ------------------------------------------------------------------------------------------------ grades


def _graded(context: Context[SelectStage], rows: Sequence[Answered]) -> list[Answer]:
    """The rows with the grades that they have, or are given here."""
    config = context.config
    keys = [json.dumps([message.as_dict() for message in row.prompt]) for row in rows]
    if not config.rewards:
        return _with_solved([_as_read(row, key, config) for row, key in zip(rows, keys, strict=True)], given=True)
    if without := next((row for row in rows if row.answer is None), None):
        raise Place(without.origin)["completion"].bad("no answer to grade", "leave rewards out, or the row")
    names = {key: str(row.origin) for row, key in zip(reversed(rows), reversed(keys), strict=True)}
    attempts = [
        Attempt(
            task=Task(id=names[key], messages=row.prompt, columns=row.columns),
            messages=(row.answer,) if row.answer is not None else (),
            completion_tokens=(),
            truncated=False,
            max_tokens=0,
        )
        for row, key in zip(rows, keys, strict=True)
    ]
    grading = rubric(listed(config.data)[0], config.rewards, context.world)
    try:
        grading.check([attempt.task for attempt in attempts])
        scores = grading.score(attempts, step=1)
    finally:
        grading.close()
    graded = [
        Answer(row=row, key=key, reward=score.value, correct=score.correct, note=score.note)
        for row, key, score in zip(rows, keys, scores, strict=True)
    ]
    return _with_solved(graded, given=False)


def _as_read(row: Answered, key: str, config: SelectStage) -> Answer:
    """A row with its own grades. Raises `BadRow` where one is missing that a filter asks for."""
    place, columns = Place(row.origin), row.columns
    asked = {"reward": config.best or config.min_reward is not None or config.write == "pairs"}
    asked["correct"] = config.correct is not None or (config.difficulty is not None and "solved" not in columns)
    for name, needed in asked.items():
        if needed and columns.get(name) is None:
            raise place[name].bad("no such column", "give the stage rewards, or the stage that made the rows")
    reward = columns.get("reward")
    value = None if reward is None else finite(reward, place["reward"])
    return Answer(row=row, key=key, reward=value, correct=columns.get("correct"), solved=columns.get("solved"))


def _with_solved(answers: Sequence[Answer], *, given: bool) -> list[Answer]:
    """The same, each with the share of right answers to its prompt: the mean of what the rows say, or of verdicts."""
    shares: dict[str, list[float]] = {}
    for answer in answers:
        known = answer.solved if given and answer.solved is not None else answer.correct
        if known is not None:
            shares.setdefault(answer.key, []).append(float(known))
    return [replace(a, solved=fmean(shares[a.key]) if a.key in shares else None) for a in answers]


# ----------------------------------------------------------------------------------------------- filters


def _filter(kept: Kept, config: SelectStage, grams: set[Words]) -> None:
    """Leave out what the keys of the recipe say, in their order."""
    whole = config.write == "answers"  # pairs want bad answers, too, and of tasks the answers are not written
    if config.write != "tasks":
        kept.keep("without an answer", lambda a: a.row.answer is not None)
    if config.rewards:
        kept.keep("not graded", lambda a: a.reward is not None)
    if grams:
        kept.keep("shared with an evaluation set", lambda a: not _leaked(a, config.ngram, grams))
    if config.difficulty is not None:
        low, high = config.difficulty
        kept.keep("too hard", lambda a: a.solved is not None and a.solved >= low)
        kept.keep("too easy", lambda a: a.solved is not None and a.solved <= high)
    if config.correct is not None and config.write != "pairs":
        kept.keep("wrong" if config.correct else "right", lambda a: a.correct is config.correct)
    if (least := config.min_reward) is not None:
        kept.keep("below min_reward", lambda a: a.reward is not None and a.reward >= least)
    if config.max_similarity is not None and config.write != "tasks":
        kept.pick("too similar to another", partial(_different, limit=config.max_similarity))
    if config.best is not None and whole:
        kept.pick("not among the best", lambda group: _ranked(group)[: config.best])


def _leaked(answer: Answer, n: int, grams: set[Words]) -> bool:
    return any(ngrams(text, n) & grams for text in (*_texts(answer.row.prompt), answer.text))


def _ranked(group: Sequence[Answer]) -> list[Answer]:
    """The highest rewards first, equal ones as they came."""
    return sorted(group, key=lambda answer: -(answer.reward or 0.0))


def _different(group: Sequence[Answer], limit: float) -> list[Answer]:
    """Those that are not too similar to a better one."""
    chosen: dict[str, tuple[Answer, set[Words]]] = {}
    for answer in _ranked(group):
        grams = ngrams(answer.text, TRIGRAMS)
        if answer.text not in chosen and all(jaccard(grams, other) <= limit for _, other in chosen.values()):
            chosen[answer.text] = answer, grams
    return [answer for answer, _ in chosen.values()]


# ----------------------------------------------------------------------------------------------- writing


def _answers(kept: Kept, config: SelectStage) -> Iterator[Row]:
    for answer in kept.answers:
        assert answer.row.answer is not None
        yield _base(answer) | {"completion": [answer.row.answer.as_dict()]} | answer.grades


def _tasks(kept: Kept, config: SelectStage) -> Iterator[Row]:
    for first, *_ in kept.groups:
        yield {k: v for k, v in _base(first).items() if k not in OF_ANSWERS} | {"solved": first.solved}


def _pairs(kept: Kept, config: SelectStage) -> Iterator[Row]:
    """Of each prompt the best answer over the worst, the second best over the second worst, and so on."""
    found: list[tuple[Answer, Answer]] = []
    for group in kept.groups:
        ranked = _ranked(group)
        for better, worse in zip(ranked[: min(config.best or 1, len(ranked) // 2)], ranked[::-1], strict=False):
            told = not config.correct or (better.correct is True and worse.correct is False)
            if told and (better.reward or 0.0) > (worse.reward or 0.0):
                found.append((better, worse))
    used = {id(answer) for pair in found for answer in pair}
    kept.keep("not in a pair", lambda a: id(a) in used)
    for better, worse in found:
        row = {k: v for k, v in _base(better).items() if k not in OF_ANSWERS}
        for name, answer in (("chosen", better), ("rejected", worse)):
            assert answer.row.answer is not None
            row |= {name: [answer.row.answer.as_dict()], f"{name}_score": answer.reward}
        yield row


def _base(answer: Answer) -> dict[str, Any]:
    origin, columns = str(answer.row.origin), beside(answer.row.columns)
    return {"task": origin, **columns, "prompt": [message.as_dict() for message in answer.row.prompt]}


_WRITERS: Mapping[str, Callable[[Kept, SelectStage], Iterator[Row]]] = {
    "answers": _answers,
    "pairs": _pairs,
    "tasks": _tasks,
}


def check_select(context: Context[SelectStage]) -> Seen:
    """Its rows, and the sets that must not be among them."""
    read, unread = _read(context.config)
    held_out = len(list(_held_out(context.config)))
    parts = [f"{len(read):,} rows", *(d.describe() for d in unread if d.total)]
    parts += [f"none of them to be among {held_out:,} held-out tasks"] if held_out else []
    return Seen(summary="; ".join(parts), prompts=[row.prompt for row in read[:SHOWN]])


KIND = Kind(
    config=SelectStage,
    run=run_select,
    check=check_select,
    needs=lambda config: None,
    look=Look(makes_rows=True),
)
