"""The step label stage: what a step is worth is found out by going on from it (Math-Shepherd, 2312.08935).

An answer's prefix is its own sampled tokens up to the one that completes a step: nothing is tokenized again, so what
goes on is exactly what the policy had written. Prefixes that several answers share are gone on from once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean

from whet.config import TrainConfig
from whet.config.rows import StepLabelsStage
from whet.envs.base import Attempt, Task
from whet.envs.rewards.model import split_steps
from whet.errors import SamplerError
from whet.pipeline.generate import Chunk, Counts, Row, make_rows, writable
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import check_tasks, player, tasks_of
from whet.pipeline.stage import Context, Kind
from whet.records import Ending, Episode, Outcome, seed_of
from whet.rollouts.play import Player
from whet.sampling.base import Request, run, sample_all
from whet.templates.places import completing_tokens
from whet.tracking.charts import ROWS_LOOK

Tokens = tuple[int, ...]


def run_step_labels(context: Context[StepLabelsStage]) -> None:
    """Sample answers, go on from each of their steps, and write what came of it."""
    config = context.config
    with closing(rubric(config.tasks, config.rewards, context.world)) as grading:
        tasks = tasks_of(context, grading, each=f" x {config.samples} answers")
        policy = context.world.policy(context.model, TrainConfig(), config.sampling)
        labels = _Labels(context, player(policy, grading, config.sampling))
        make_rows(context, tasks, config.chunk, labels.chunk, decode=policy.template.decode)


@dataclass(frozen=True, slots=True)
class _Steps:
    """An answer in steps, and the tokens up to the end of each but the last."""

    task: Task
    text: tuple[str, ...]
    prefixes: tuple[Tokens, ...]
    right: bool | None


@dataclass(frozen=True, slots=True)
class _Labels:
    context: Context[StepLabelsStage]
    player: Player

    def chunk(self, number: int, chosen: Sequence[Task]) -> Chunk:
        """The rows of a chunk of tasks; answers that were cut off, say nothing or were not judged make none."""
        seed = seed_of(self.context.seed, "step labels", number)
        played = self.player.play(chosen, self.context.config.samples, step=number, seed=seed)
        tally = Counts(float)
        answers = []
        for task, group in zip(chosen, played.groups, strict=True):
            for episode in group.episodes:
                finished = episode.outcome is Outcome.FINISHED
                if not finished or not writable(self.player.template, task.messages, episode.messages[-1].content):
                    tally["answers/left_out"] += 1
                else:
                    answers.append(self._steps(task, episode))
        values = self._values(answers, number, seed)
        rows = []
        for answer in answers:
            known = [values.get((answer.task.id, prefix)) for prefix in answer.prefixes]
            if answer.right is None or None in known:
                tally["answers/left_out"] += 1
            else:
                rows.append(self._row(answer, [value for value in known if value is not None], right=answer.right))
        found = [label for row in rows for label in row["labels"]]
        tally["labels"] += len(found)
        tally["labels/right"] += fmean(found) if found else 0.0
        return Chunk(rows=rows, metrics={**tally, "time/rollout": played.rollout_s}, groups=played.groups)

    def _steps(self, task: Task, episode: Episode) -> _Steps:
        (turn,) = episode.turns
        answer = episode.messages[-1].content
        text = split_steps(answer, self.context.config.separator)
        ends = list(accumulate(map(len, text)))[:-1]
        places = completing_tokens(turn.completion.tokens.tolist(), answer, ends, self.player.template.decode)
        prefixes = tuple(tuple(turn.completion.tokens[: place + 1].tolist()) for place in places)
        return _Steps(task=task, text=tuple(text), prefixes=prefixes, right=episode.score.correct)

    def _values(self, answers: Sequence[_Steps], number: int, seed: int) -> dict[tuple[str, Tokens], float]:
        """For each task's prefix the share of its completions that are right; those without a verdict do not count."""
        asked = list({(a.task.id, prefix): a.task for a in answers for prefix in a.prefixes}.items())
        requests = [
            Request(
                prompt=self._prompt(task) + prefix,
                seed=seed_of(seed, "go on", place, sample),
                params=replace(self.player.params, max_tokens=self._room(task, prefix)),
                samples=self.context.config.rollouts,
            )
            for place, ((_, prefix), task) in enumerate(asked)
            for sample in range(self.context.config.rollouts)
        ]
        finished: list[tuple[int, Attempt]] = []
        for index, completion in enumerate(run(sample_all(self.player.sampler, requests))):
            if isinstance(completion, SamplerError):
                continue  # says nothing about the step
            place = index // self.context.config.rollouts
            (_, prefix), task = asked[place]
            tokens = prefix + tuple(completion.tokens.tolist())
            attempt = Attempt(
                task=task,
                messages=(self.player.template.parse(tokens, completion.ending),),
                completion_tokens=tokens,
                truncated=completion.ending is Ending.LENGTH,
                max_tokens=self._room(task, ()),
            )
            finished.append((place, attempt))
        scores = self.player.rubric.score([attempt for _, attempt in finished], step=number)
        verdicts: dict[tuple[str, Tokens], list[float]] = {}
        for (place, _), score in zip(finished, scores, strict=True):
            if score.correct is not None:
                verdicts.setdefault(asked[place][0], []).append(float(score.correct))
        return {key: fmean(given) for key, given in verdicts.items()}

    def _prompt(self, task: Task) -> Tokens:
        return self.player.template.prompt(task.messages, settings=task.settings)

    def _room(self, task: Task, prefix: Tokens) -> int:
        """Tokens that are left of the answer's budget and of the model's; a finished answer left at least one."""
        left = self.player.max_length - len(self._prompt(task))
        return max(1, min(self.player.params.max_tokens, left) - len(prefix))

    def _row(self, answer: _Steps, values: Sequence[float], *, right: bool) -> Row:
        hard = self.context.config.labels == "hard"
        labels = [float(value > 0) if hard else value for value in values] + [float(right)]
        wrong = next((index for index, label in enumerate(labels) if label == 0), len(labels))
        return {
            "prompt": [message.as_dict() for message in answer.task.messages],
            **({"chat_template_kwargs": dict(answer.task.settings)} if answer.task.settings else {}),
            "steps": list(answer.text),
            "separator": "",
            "labels": labels[: wrong + 1],
            "right": right,
            "task": answer.task.id,
        }


KIND = Kind(config=StepLabelsStage, run=run_step_labels, check=check_tasks, look=ROWS_LOOK)
