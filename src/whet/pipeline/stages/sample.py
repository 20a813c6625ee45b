"""The sampling stage: answers to every task by the policy or by teachers, each a row with its grade."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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
from whet.pipeline.playing import SHOWN, Ungraded, look_at_tasks, playable, player
from whet.pipeline.stage import Context, Kind, Needs, Seen, keep_dropped
from whet.records import Episode, Group, Outcome, Reply, Score, seed_of
from whet.rollouts.play import Player
from whet.templates.base import Template
from whet.tracking.charts import Look

POLICY = "policy"


def run_sample(context: Context[SampleStage]) -> None:
    """Sample, grade and write until every task has its answers."""
    config, world, model = context.config, context.world, context.model
    grading = rubric(config.tasks, config.rewards, world)
    chats = {i: world.chat(author) for i, author in enumerate(config.authors) if not isinstance(author, str)}
    try:
        problems = playable(config.tasks, model, world, grading, max_tokens=config.max_tokens)
        by = f" of each of {len(config.authors)} authors" if len(config.authors) > 1 else ""
        context.console.say(f"{context.name}: {problems.describe()} x {config.samples} answers{by}")
        keep_dropped(context, "tasks", problems.lost)
        rewards: Rubric = grading if config.rewards else Ungraded("the stage has no rewards")
        play = None
        if POLICY in config.authors:
            play = player(world.policy(model, TrainConfig(), config.sampling), rewards, config.sampling)
        template = world.template(model)
        sample = _Sample(context, config, template, rewards, play, chats)
        make_rows(context, problems.tasks, config.chunk, sample.chunk, decode=template.decode)
    finally:
        for chat in chats.values():
            chat.close()
        grading.close()


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
    config: SampleStage
    template: Template
    rewards: Rubric
    play: Player | None
    chats: Mapping[int, ChatClient]

    def chunk(self, number: int, chosen: Sequence[Task]) -> Chunk:
        """The rows of a chunk of tasks: `samples` answers of each author to each."""
        began, shown = time.perf_counter(), [with_hint(task, self.config.hint) for task in chosen]
        asked = {f"author {place}": self._asked(chat, shown, number) for place, chat in self.chats.items()}
        groups: tuple[Group, ...] = ()
        if self.play is not None:
            seed = seed_of(self.context.seed, "sample", number)
            groups = self.play.play(shown, self.config.samples, step=number, seed=seed).groups
        said = asked | ({POLICY: [_played(e) for group in groups for e in group.episodes]} if groups else {})
        tally, size = Counts(), self.config.samples
        rows = [
            row
            for place, task in enumerate(chosen)
            for author, answers in said.items()
            for row in self._rows(task, author, answers[place * size :][:size], tally)
        ]
        return Chunk(
            rows=rows,
            metrics={**tally.counts, "time/rollout": time.perf_counter() - began},
            groups=groups,
            failures=[each.reply.failure for given in asked.values() for each in given if each.reply.message is None],
            candidates=sum(map(len, asked.values())),
        )

    def _asked(self, chat: ChatClient, shown: Sequence[Task], number: int) -> list[_Said]:
        """A client's answers to the tasks, graded."""
        games, limit = [task for task in shown for _ in range(self.config.samples)], self.config.max_tokens
        replies = chat.chat([task.messages for task in games], max_tokens=limit)
        attempts = [
            Attempt(task=t, messages=(r.message,), completion_tokens=(), truncated=r.cut_off, max_tokens=limit)
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
            tally.add("answers/right", float(score.correct or False))
            if reply.message is None:
                tally.add("answers/failed")
            elif reply.cut_off:
                tally.add("answers/cut_off")
            elif not writable(self.template, task.messages, reply.message.content):
                tally.add("answers/unusable")
            elif self.config.rewards and score.value is None:
                tally.add("answers/ungraded")
            else:
                grades = {"reward": score.value, "correct": score.correct}
                grades["solved"] = fmean(verdicts) if verdicts else None
                about = {
                    "author": author,
                    "sample": sample,
                    "tokens": tokens,
                    **(grades if self.config.rewards else {}),
                }
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
    look=Look(makes_rows=True),
)
