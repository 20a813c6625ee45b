"""The sampling stage: answers to every task by the policy or by teachers, each a row with its grade."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from whet.config import SampleStage, TrainConfig
from whet.data.faults import nearest
from whet.envs.base import Attempt, Rubric, Task
from whet.envs.clients import ChatClient
from whet.errors import DataError
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.generate import Chunk, Counts, Row, beside, make_rows, writable
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import SHOWN, Ungraded, look_at_tasks, playable, player
from whet.pipeline.stage import Context, Kind, Needs, Seen
from whet.records import Group, Outcome, Reply, Score, seed_of
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


@dataclass(frozen=True, slots=True)
class _Sample:
    context: Context[SampleStage]
    config: SampleStage
    template: Template
    rewards: Rubric
    play: Player | None
    chats: dict[int, ChatClient]

    def chunk(self, number: int, chosen: Sequence[Task]) -> Chunk:
        """The rows of a chunk of tasks."""
        began, shown, size = time.perf_counter(), [with_hint(task, self.config.hint) for task in chosen], 1
        groups: tuple[Group, ...] = ()
        said: dict[str, list[tuple[Reply, Score, int | None]]] = {}
        if self.play is not None:
            seed = seed_of(self.context.seed, "sample", number)
            groups = self.play.play(shown, self.config.samples, step=number, seed=seed).groups
            said[POLICY] = [
                (
                    Reply(
                        message=episode.messages[-1] if episode.turns else None,
                        cut_off=episode.outcome is Outcome.TRUNCATED,
                    ),
                    episode.score,
                    episode.sampled_tokens,
                )
                for group in groups
                for episode in group.episodes
            ]
        for place, chat in self.chats.items():
            said[f"author {place}"] = self._asked(chat, shown, number)
        size, tally, rows = self.config.samples, Counts(), []
        for place, task in enumerate(chosen):
            for author, answers in said.items():
                rows += self._rows(task, author, answers[place * size :][:size], tally)
        replies = [reply for author, answers in said.items() if author != POLICY for reply, _, _ in answers]
        return Chunk(
            rows=rows,
            metrics={**tally.counts, "time/rollout": time.perf_counter() - began},
            groups=groups,
            failures=[reply.failure for reply in replies if reply.message is None],
            candidates=len(replies),
        )

    def _asked(self, chat: ChatClient, shown: Sequence[Task], number: int) -> list[tuple[Reply, Score, int | None]]:
        """A client's answers to each task, graded."""
        games = [task for task in shown for _ in range(self.config.samples)]
        limit = self.config.max_tokens
        replies = chat.chat([task.messages for task in games], max_tokens=limit)
        attempts = [
            Attempt(task=t, messages=(r.message,), completion_tokens=(), truncated=r.cut_off, max_tokens=limit)
            for t, r in zip(games, replies, strict=True)
            if r.message is not None
        ]
        scores = iter(self.rewards.score(attempts, step=number))
        return [(r, Score(value=None) if r.message is None else next(scores), None) for r in replies]

    def _rows(
        self, task: Task, author: str, answers: Sequence[tuple[Reply, Score, int | None]], tally: Counts
    ) -> list[Row]:
        """A row for each answer that a later stage can read; `solved` counts the others, too."""
        verdicts = [score.correct for _, score, _ in answers if score.correct is not None]
        rows: list[Row] = []
        for sample, (reply, score, tokens) in enumerate(answers):
            graded = score.value is not None
            tally.add("answers/right", float(score.correct or False))
            if reply.message is None:
                tally.add("answers/failed")
            elif reply.cut_off:
                tally.add("answers/cut_off")
            elif not writable(self.template, task.messages, reply.message.content):
                tally.add("answers/unusable")
            elif self.config.rewards and not graded:
                tally.add("answers/ungraded")
            else:
                row = {"completion": [reply.message.as_dict()], "author": author, "sample": sample, "tokens": tokens}
                if graded:
                    row |= {"reward": score.value, "correct": score.correct}
                    row["solved"] = fmean(verdicts) if verdicts else None
                asked = {"prompt": [message.as_dict() for message in task.messages], "task": task.id}
                rows.append(beside(task.columns) | asked | row)
        return rows


def check_sample(context: Context[SampleStage]) -> Seen:
    """Its tasks, as they are shown."""
    seen, found = look_at_tasks(context)
    return replace(seen, prompts=[with_hint(task, context.config.hint).messages for task in found.tasks[:SHOWN]])


KIND = Kind(
    config=SampleStage,
    run=run_sample,
    check=check_sample,
    needs=lambda c: Needs(sampling=c.sampling) if POLICY in c.authors else None,
    look=Look(makes_rows=True),
)
