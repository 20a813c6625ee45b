"""The sampling stage: answers to every task by the policy or by teachers, each a row with its grade."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean

from whet.config import SampleStage, TrainConfig
from whet.data.faults import nearest
from whet.envs.base import Attempt, Rubric, Task
from whet.envs.clients import ChatClient
from whet.errors import DataError
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.generate import Chunk, Counts, Row, beside, make_rows, writable
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import Ungraded, look_at_tasks, playable, player
from whet.pipeline.stage import Context, Kind, Needs, Seen
from whet.records import Episode, Group, Outcome, Reply, Score, seed_of
from whet.rollouts.play import Player
from whet.templates.base import Template
from whet.tracking.charts import Look

POLICY = "policy"


def run_sample(context: Context[SampleStage]) -> None:
    """Sample, grade and write until every task has its answers."""
    config = context.config
    grading = rubric(config.tasks, config.rewards, context.world)
    chats = {
        f"author {place}": context.world.chat(author)
        for place, author in enumerate(config.authors)
        if not isinstance(author, str)
    }
    try:
        problems = playable(config.tasks, context.model, context.world, grading, max_tokens=config.max_tokens)
        shown = [(task, with_hint(task, config.hint)) for task in problems.tasks]
        context.console.say(
            f"{context.name}: {problems.describe()} x {config.samples} answers of {len(config.authors)} authors"
        )
        keep_dropped(context, "tasks", problems.lost)
        rewards: Rubric = grading if config.rewards else Ungraded("the stage has no rewards")
        play = None
        if POLICY in config.authors:
            play = player(context.world.policy(context.model, TrainConfig(), config.sampling), rewards, config.sampling)
        template = context.world.template(context.model)
        sample = _Sample(context, config, template, rewards, play, chats)
        make_rows(context, shown, config.chunk, sample.chunk, decode=template.decode)
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
    chats: Mapping[str, ChatClient]

    def chunk(self, number: int, chosen: Sequence[tuple[Task, Task]]) -> Chunk:
        """The rows of a chunk of tasks, each with what is shown of it."""
        began, shown = time.perf_counter(), [hinted for _, hinted in chosen]
        played: dict[str, Sequence[Group]] = {}
        failures: list[str] = []
        if self.play is not None:
            seed = seed_of(self.context.seed, "sample", number)
            played[POLICY] = self.play.play(shown, self.config.samples, step=number, seed=seed).groups
        for name, chat in self.chats.items():
            played[name] = self._asked(chat, shown, number)
            failures += [e.score.note for g in played[name] for e in g.episodes if e.outcome is Outcome.ENGINE_ERROR]
        tally = Counts(
            {"answers/failed": 0.0, "answers/cut_off": 0.0, "answers/unusable": 0.0, "answers/ungraded": 0.0}
        )
        rows = [
            row
            for place, (task, _) in enumerate(chosen)
            for name, groups in played.items()
            for row in self._rows(task, name, groups[place], tally)
        ]
        right = [float(row["correct"]) for row in rows if row.get("correct") is not None]
        solved = {"solved": fmean(right)} if right else {}
        return Chunk(
            rows=rows,
            metrics={**tally.counts, **solved, "time/rollout": time.perf_counter() - began},
            groups=tuple(chain.from_iterable(played.values())),
            failures=failures,
            candidates=len(self.chats) * len(shown) * self.config.samples,
        )

    def _asked(self, chat: ChatClient, shown: Sequence[Task], number: int) -> list[Group]:
        """A client's answers as episodes without tokens of ours."""
        games = [(task, sample) for task in shown for sample in range(self.config.samples)]
        replies = chat.chat([task.messages for task, _ in games], max_tokens=self.config.max_tokens)
        attempts = [
            Attempt(
                task=task,
                messages=(reply.message,),
                completion_tokens=(),
                truncated=reply.cut_off,
                max_tokens=self.config.max_tokens,
            )
            for (task, _), reply in zip(games, replies, strict=True)
            if reply.message is not None
        ]
        scores = iter(self.rewards.score(attempts, step=number))
        episodes = [
            _episode(task, sample, reply, None if reply.message is None else next(scores))
            for (task, sample), reply in zip(games, replies, strict=True)
        ]
        size = self.config.samples
        return [Group(task=t.id, episodes=tuple(episodes[i * size :][:size])) for i, t in enumerate(shown)]

    def _rows(self, task: Task, author: str, group: Group, tally: Counts) -> list[Row]:
        """A row for each answer that a later stage can read; `solved` counts the others, too."""
        verdicts = [e.score.correct for e in group.episodes if e.score.correct is not None]
        solved = fmean(verdicts) if verdicts else None
        rows = []
        for episode in group.episodes:
            if episode.outcome in (Outcome.ENGINE_ERROR, Outcome.ENVIRONMENT_ERROR):
                tally.add("answers/failed")
            elif episode.outcome is Outcome.TRUNCATED:
                tally.add("answers/cut_off")
            elif not writable(self.template, task.messages, episode.messages[-1].content):
                tally.add("answers/unusable")
            elif self.config.rewards and episode.score.value is None:
                tally.add("answers/ungraded")
            else:
                rows.append(_row(task, author, episode, solved))
        return rows


def _episode(task: Task, sample: int, reply: Reply, score: Score | None) -> Episode:
    if reply.message is None or score is None:
        failed = Score(value=None, note=reply.failure)
        return Episode(
            task=task.id, sample=sample, seed=0, messages=task.messages, turns=(), score=failed,
            outcome=Outcome.ENGINE_ERROR,
        )  # fmt: skip
    ended = Outcome.TRUNCATED if reply.cut_off else Outcome.FINISHED if score.value is None else score.outcome
    messages = (*task.messages, reply.message)
    return Episode(task=task.id, sample=sample, seed=0, messages=messages, turns=(), score=score, outcome=ended)


def _row(task: Task, author: str, episode: Episode, solved: float | None) -> Row:
    row = beside(task.columns) | {
        "prompt": [message.as_dict() for message in task.messages],
        "completion": [episode.messages[-1].as_dict()],
        "task": task.id,
        "author": author,
        "sample": episode.sample,
        "tokens": episode.sampled_tokens or None,
    }
    if episode.score.value is not None:
        row |= {"reward": episode.score.value, "correct": episode.score.correct, "solved": solved}
    return row


def check_sample(context: Context[SampleStage]) -> Seen:
    """Its tasks, and that the hint finds its columns."""
    seen, found = look_at_tasks(context)
    return replace(
        seen, prompts=[with_hint(task, context.config.hint).messages for task in found.tasks[: len(seen.prompts)]]
    )


KIND = Kind(
    config=SampleStage,
    run=run_sample,
    check=check_sample,
    needs=lambda c: Needs(sampling=c.sampling) if POLICY in c.authors else None,
    look=Look(makes_rows=True),
)
