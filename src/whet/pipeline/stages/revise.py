"""The revision stage: answer, critique under a principle, revision; rows to imitate (Constitutional AI, 2212.08073)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from statistics import fmean

from whet.config import ModelConfig, SamplingConfig
from whet.config.judge import LocalChat
from whet.config.rows import ReviseStage
from whet.envs.base import Task
from whet.envs.clients import ChatClient
from whet.envs.judges.judge import read_principles
from whet.envs.judges.revise import Revision, revise
from whet.pipeline.generate import Chunk, Row, make_rows, writable
from whet.pipeline.load_data import tasks
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Kind, Needs, Seen, keep_dropped
from whet.records import seed_of
from whet.tracking.charts import ROWS_LOOK


def run_revise(context: Context[ReviseStage]) -> None:
    """Answer, criticise and rewrite until every task has its row."""
    config, world = context.config, context.world
    listed, unread = tasks(config.tasks)
    principles = read_principles(config.principles)
    lost = f"; {unread.describe()}" if unread.any else ""
    keep_dropped(context, "tasks", [unread])
    context.console.say(f"{context.name}: {len(listed):,} tasks, {len(principles)} principles{lost}")
    model = {key: getattr(context.model, key) for key in ModelConfig.model_fields}
    with ExitStack() as opened:
        author = opened.enter_context(closing(world.chat(LocalChat(**model, temperature=config.temperature))))
        writer = author if config.writer is None else opened.enter_context(closing(world.chat(config.writer)))
        make_rows(context, listed, config.chunk, partial(_chunk, context, author, writer, principles))


def _chunk(
    context: Context[ReviseStage],
    author: ChatClient,
    writer: ChatClient,
    principles: Sequence[str],
    number: int,
    chosen: Sequence[Task],
) -> Chunk:
    config, asked = context.config, [task.messages for task in chosen]
    found = revise(
        writer,
        asked,
        author.chat(asked, max_tokens=config.max_tokens),
        principles=principles,
        rounds=config.rounds,
        seeds=[seed_of(context.seed, number, place) for place in range(len(chosen))],
        max_tokens=config.max_tokens,
        everything=config.visible == "everything",
    )
    template = context.world.template(context.model)
    written = [(task, each) for task, each in zip(chosen, found, strict=True) if each.revised is not None]
    rows = [_row(task, each) for task, each in written if writable(template, task.messages, each.revised or "")]
    failed = [each for each in found if each.revised is None and not (each.leaked or each.cut_off)]
    metrics = {
        "revisions/failed": float(len(failed)),
        "revisions/leaked": float(sum(each.leaked for each in found)),
        "revisions/cut_off": float(sum(each.cut_off for each in found)),
        "revisions/unusable": float(len(written) - len(rows)),
        "revisions/unchanged": float(sum(row["completion"] == row["draft"] for row in rows)),
        "revisions/characters": fmean(len(each.revised or "") for each in found),
    }
    return Chunk(rows=rows, metrics=metrics, failures=[each.failure for each in failed], candidates=len(found))


def _row(task: Task, revision: Revision) -> Row:
    return {
        "prompt": [message.as_dict() for message in task.messages],
        "completion": revision.revised,
        "draft": revision.draft,
        "principles": list(revision.principles),
        "critiques": list(revision.critiques),
        "task": task.id,
    }


def check_revise(context: Context[ReviseStage]) -> Seen:
    """Its tasks and principles."""
    config = context.config
    listed, unread = tasks(config.tasks)
    summary = f"{len(listed):,} tasks, {len(read_principles(config.principles))} principles; {unread.describe()}"
    return Seen(summary=summary, prompts=listed[:SHOWN])


KIND = Kind(
    config=ReviseStage,
    run=run_revise,
    check=check_revise,
    needs=lambda c: Needs(sampling=SamplingConfig(max_tokens=c.max_tokens, max_running=c.chunk)),
    look=ROWS_LOOK,
)
