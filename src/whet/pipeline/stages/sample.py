"""The sampling stage: answers to every task by the policy or by teachers, each a row with its grade."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from whet.config import SampleStage, TrainConfig
from whet.data.faults import nearest
from whet.envs.base import Attempt, Rubric, Task
from whet.envs.clients import ChatClient
from whet.errors import DataError
from whet.pipeline.generate import Chunk, Counts, Row, beside, make_rows, writable
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import SHOWN, Ungraded, look_at_tasks, player, tasks_of
from whet.pipeline.stage import Context, Kind, Needs, Seen
from whet.records import Episode, Group, Outcome, Reply, Score, seed_of
from whet.rollouts.play import Player
from whet.templates.base import Template
from whet.tracking.charts import ROWS_LOOK

POLICY = "policy"


def run_sample(context: Context[SampleStage]) -> None:
    """Sample, grade and write until every task has its answers."""
    config, world, model = context.config, context.world, context.model
    with ExitStack() as opened:
        grading = opened.enter_context(closing(rubric(config.tasks, config.rewards, world)))
        asked = {place: author for place, author in enumerate(config.authors) if not isinstance(author, str)}
        chats = {place: opened.enter_context(closing(world.chat(author))) for place, author in asked.items()}
        by = f" of each of {len(config.authors)} authors" if len(config.authors) > 1 else ""
        tasks = tasks_of(context, grading, each=f" x {config.samples} answers{by}")
        rewards: Rubric = grading if config.rewards else Ungraded("the stage has no rewards")
        play = None
        if POLICY in config.authors:
            play = player(world.policy(model, TrainConfig(), config.sampling), rewards, config.sampling)
        sample = _Sample(context, world.template(model), rewards, play, chats)
        make_rows(context, tasks, config.chunk, sample.chunk, decode=sample.template.decode)


def with_hint(task: Task, hint: str | None) -> Task:
    """The task whose last message ends with the hint. Raises `DataError` where it names a column that is not there."""
    if hint is None:
        return task
    try:
        text = hint.format_map(task.columns)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"task {task.id}: hint: {error}; {nearest(str(error).strip(chr(39)), task.columns)}") from error
    *before, last = task.messages
    return replace(task, messages=(*before, replace(last, content=f"{last.content} {text}")))


class _Said(NamedTuple):
    """An answer, or why there is none, and its grade."""

    reply: Reply
    score: Score
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    context: Context[SampleStage]
    template: Template
    rewards: Rubric
    play: Player | None
    chats: Mapping[int, ChatClient]

    def chunk(self, number: int, chosen: Sequence[Task]) -> Chunk:
        """The rows of a chunk of tasks: `samples` answers of each author to each."""
        began, shown = time.perf_counter(), [with_hint(task, self.context.config.hint) for task in chosen]
        asked = {f"author {place}": self._asked(chat, shown, number) for place, chat in self.chats.items()}
        groups: tuple[Group, ...] = ()
        if self.play is not None:
            seed = seed_of(self.context.seed, "sample", number)
            groups = self.play.play(shown, self.context.config.samples, step=number, seed=seed).groups
        said = asked | ({POLICY: [_played(e) for group in groups for e in group.episodes]} if groups else {})
        tally, size = Counts(float), self.context.config.samples
        rows = [
            row
            for place, task in enumerate(chosen)
            for author, answers in said.items()
            for row in self._rows(task, author, answers[place * size :][:size], tally)
        ]
        return Chunk(
            rows=rows,
            metrics={**tally, "time/rollout": time.perf_counter() - began},
            groups=groups,
            failures=[each.reply.failure for given in asked.values() for each in given if each.reply.message is None],
            candidates=sum(map(len, asked.values())),
        )

    def _asked(self, chat: ChatClient, shown: Sequence[Task], number: int) -> list[_Said]:
        """A client's answers to the tasks, graded."""
        config = self.context.config
        games, limit = [task for task in shown for _ in range(config.samples)], config.max_tokens
        replies = chat.chat([task.messages for task in games], max_tokens=limit)
        attempts = [
            Attempt(task=t, messages=(r.message,), truncated=r.cut_off, max_tokens=limit)
            for t, r in zip(games, replies, strict=True)
            if r.message is not None
        ]
        scores = iter(self.rewards.score(attempts, step=number))
        return [_Said(r, Score(value=None) if r.message is None else next(scores)) for r in replies]

    def _rows(self, task: Task, author: str, answers: Sequence[_Said], tally: Counts) -> Iterator[Row]:
        """A row for each answer that a later stage can read; `solved` counts the others, too."""
        verdicts = [each.score.correct for each in answers if each.score.correct is not None]
        base = {**beside(task.columns), "prompt": [message.as_dict() for message in task.messages], "task": task.id}
        for sample, (reply, score, tokens) in enumerate(answers):
            tally["answers/right"] += bool(score.correct)
            if reply.message is None:
                tally["answers/failed"] += 1
            elif reply.cut_off:
                tally["answers/cut_off"] += 1
            elif not writable(self.template, task.messages, reply.message.content):
                tally["answers/unusable"] += 1
            elif self.context.config.rewards and score.value is None:
                tally["answers/ungraded"] += 1
            else:
                grades = {"reward": score.value, "correct": score.correct}
                grades["solved"] = fmean(verdicts) if verdicts else None
                about = {"author": author, "sample": sample, "tokens": tokens}
                about |= grades if self.context.config.rewards else {}
                yield base | {"completion": [reply.message.as_dict()]} | about


def _played(episode: Episode) -> _Said:
    message = episode.messages[-1] if episode.turns else None
    reply = Reply(message=message, failure=episode.score.note, cut_off=episode.outcome is Outcome.TRUNCATED)
    return _Said(reply, episode.score, episode.sampled_tokens)


def check_sample(context: Context[SampleStage]) -> Seen:
    """Its tasks, as they are shown."""
    seen, found = look_at_tasks(context)
    return replace(seen, prompts=[with_hint(task, context.config.hint) for task in found.tasks[:SHOWN]])


KIND = Kind(
    config=SampleStage,
    run=run_sample,
    check=check_sample,
    needs=lambda c: Needs(sampling=c.sampling) if POLICY in c.authors else None,
    look=ROWS_LOOK,
)
