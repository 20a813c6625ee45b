"""The revision stage: answer, critique under a principle, revision; rows to imitate (Constitutional AI, 2212.08073).

The writer sees the conversation and the answer behind a fence, as a judge does, then is asked for a critique, and then
for a better answer. What is written may not carry the principle or the fence along: that is a leak, and no row. Nor
may anything have run out of its tokens: in a row it would look finished.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from whet.config import ModelConfig, SamplingConfig
from whet.config.judge import LocalChat
from whet.config.rows import ReviseStage
from whet.envs.base import Task
from whet.envs.clients import ChatClient
from whet.envs.judges.fence import DATA, MARK, fenced, mark_of
from whet.envs.judges.judge import as_text, read_principles
from whet.envs.rewards.answers import after_thinking
from whet.pipeline.generate import Chunk, Row, make_rows, writable
from whet.pipeline.load_data import tasks
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Context, Kind, Needs, Seen, keep_dropped
from whet.records import Message, Reply, seed_of
from whet.tracking.charts import ROWS_LOOK

REWRITE = "Now write a better answer to the conversation that has none of these faults. Write the answer alone."


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What became of one answer. Without a `revised` text there is no row, and `failure` says why."""

    draft: str
    revised: str | None
    failure: str = ""
    leaked: bool = False
    cut_off: bool = False
    """Whether the draft, a critique or a revision ran out of its tokens; nothing was requested after that."""
    principles: tuple[str, ...] = ()
    critiques: tuple[str, ...] = ()


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


def revise(
    writer: ChatClient,
    asked: Sequence[tuple[Message, ...]],
    drafts: Sequence[Reply],
    *,
    principles: Sequence[str],
    rounds: int,
    seeds: Sequence[int],
    max_tokens: int,
    everything: bool = False,
) -> list[Revision]:
    """One revision of each draft, all of them a round at a time; `seeds` decide which principles are drawn.

    Thinking blocks are neither shown to the writer nor kept of what it writes, unless `everything` is the answer.
    """
    read: Callable[[str], str] = str if everything else _answer
    found = [_begun(draft) for draft in drafts]
    draws = [random.Random(seed) for seed in seeds]
    for _ in range(rounds):
        going = [i for i, revision in enumerate(found) if revision.revised is not None]
        drawn = {i: draws[i].choice(principles) for i in going}
        requests = {i: _criticise(asked[i], read(found[i].revised or ""), drawn[i]) for i in going}
        critiques = dict(zip(going, writer.chat([requests[i] for i in going], max_tokens=max_tokens), strict=True))
        going = [i for i in going if _keep(found, i, critiques[i])]
        rewrites = [(*requests[i], _said(critiques[i], _answer), Message(role="user", content=REWRITE)) for i in going]
        for i, reply in zip(going, writer.chat(rewrites, max_tokens=max_tokens), strict=True):
            if _keep(found, i, reply):
                critique, revised = _said(critiques[i], _answer).content, _said(reply, read).content
                found[i] = _next(found[i], drawn[i], critique, revised)
    return found


def _begun(draft: Reply) -> Revision:
    if draft.message is None:
        return Revision(draft="", revised=None, failure=draft.failure)
    if draft.cut_off:
        return _cut_off(draft.message.content)
    return Revision(draft=draft.message.content, revised=draft.message.content)


def _cut_off(draft: str) -> Revision:
    return Revision(draft=draft, revised=None, failure="a text ran out of its max_tokens", cut_off=True)


def _keep(found: list[Revision], index: int, reply: Reply) -> bool:
    """Whether there is a reply to go on with; else the revision is over."""
    if reply.cut_off:
        found[index] = _cut_off(found[index].draft)
        return False
    if reply.message is None:
        found[index] = Revision(draft=found[index].draft, revised=None, failure=reply.failure)
    return reply.message is not None


def _next(before: Revision, principle: str, critique: str, revised: str) -> Revision:
    leaked = principle in revised or MARK.search(revised) is not None
    return Revision(
        draft=before.draft,
        revised=None if leaked else revised.strip(),
        failure="the revision repeats its instructions" if leaked else "",
        leaked=leaked,
        principles=(*before.principles, principle),
        critiques=(*before.critiques, critique),
    )


def _criticise(asked: Sequence[Message], answer: str, principle: str) -> tuple[Message, ...]:
    said = as_text(asked)
    mark = mark_of(said, answer)
    demand = f"Name in a few sentences what is wrong with the answer by this principle: {principle}"
    parts = [fenced("Conversation", said, mark), fenced("Answer", answer, mark)]
    return (Message(role="user", content="\n\n".join([DATA.format(mark=mark), *parts, demand])),)


def _said(reply: Reply, read: Callable[[str], str]) -> Message:
    assert reply.message is not None
    return Message(role="assistant", content=read(reply.message.content))


def _answer(text: str) -> str:
    """What follows the thinking; all of it where nothing does."""
    return after_thinking(text).strip() or text


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
