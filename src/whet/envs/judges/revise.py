"""Critique and revision under a principle, again and again (Constitutional AI, 2212.08073, section 3).

The writer sees the conversation and the answer behind a fence, as a judge does, then is asked for a critique, and then
for a better answer. What is written may not carry the principle or the fence along: that is a leak, and no row. Nor
may anything have run out of its tokens: in a row it would look finished.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whet.envs.clients import ChatClient
from whet.envs.judges.fence import DATA, MARK, fenced, mark_of
from whet.envs.judges.judge import as_text
from whet.envs.rewards.answers import after_thinking
from whet.records import Message, Reply

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
