"""Playing episodes: environment x sampler x template.

All episodes of a call advance together, one turn at a time, so that the sampler sees large batches. An episode's
tokens are kept as they were sampled: the next turn's prompt extends them, nothing is decoded and tokenized again.
Grading happens once, for all finished episodes of the call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from whet.envs.base import Attempt, Environment, Rubric, Task
from whet.errors import DataError, GraderError, boundary
from whet.records import Completion, Ending, Episode, Group, Message, Outcome, Score, Turn, seed_of
from whet.sampling.base import Request, SamplingParams, TokenSampler
from whet.templates.base import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Graded groups, and how long sampling and grading took."""

    groups: tuple[Group, ...]
    rollout_s: float
    score_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """Everything that playing needs; one for each stage."""

    sampler: TokenSampler
    template: Template
    environment: Callable[[Task], Environment]
    rubric: Rubric
    params: SamplingParams
    max_length: int
    """Most tokens of prompt and completions together."""
    max_turns: int = 1

    def play(self, tasks: Sequence[Task], samples: int, *, step: int, seed: int) -> Played:
        """`samples` episodes of each task, graded: one group for each task, in order.

        The random numbers of an episode depend on `seed`, its task's place and its sample number alone.
        """
        games = [
            _Game(task=task, sample=sample, seed=seed_of(seed, place, sample), environment=self.environment(task))
            for place, task in enumerate(tasks)
            for sample in range(samples)
        ]
        began = time.monotonic()
        asyncio.run(self._play_all(games))
        played = time.monotonic()
        scores = self._grade(games, step)
        episodes = [game.episode(score) for game, score in zip(games, scores, strict=True)]
        groups = tuple(
            Group(task=task.id, episodes=tuple(episodes[i * samples : (i + 1) * samples]))
            for i, task in enumerate(tasks)
        )
        return Played(groups=groups, rollout_s=played - began, score_s=time.monotonic() - played)

    async def _play_all(self, games: Sequence[_Game]) -> None:
        await asyncio.gather(*(self._start(game) for game in games))
        for turn in range(self.max_turns):
            active = [game for game in games if not game.over]
            if not active:
                break
            completions = self.sampler.sample([self._request(game, turn) for game in active])
            await asyncio.gather(
                *(self._answer(game, completion) for game, completion in zip(active, completions, strict=True))
            )

    async def _start(self, game: _Game) -> None:
        game.prompt = self.template.prompt(await game.environment.start())
        if len(game.prompt) >= self.max_length:
            raise DataError(
                f"task {game.task.id}: its prompt has {len(game.prompt)} tokens, the model attends to "
                f"{self.max_length}; drop it or shorten it"
            )

    def _request(self, game: _Game, turn: int) -> Request:
        left = min(self.params.max_tokens, self.max_length - len(game.prompt))
        return Request(prompt=game.prompt, seed=seed_of(game.seed, turn), params=replace(self.params, max_tokens=left))

    async def _answer(self, game: _Game, completion: Completion) -> None:
        message = self.template.parse(completion.tokens, completion.ending)
        game.turns.append(Turn(prompt=game.prompt, completion=completion))
        game.messages.append(message)
        if completion.ending is Ending.LENGTH:
            game.truncated = game.over = True
            return
        observations, game.over = await game.environment.step(message)
        game.messages += observations
        if not game.over:
            game.prompt = self.template.extend((*game.prompt, *completion.tokens), observations)
            game.truncated = game.over = len(game.prompt) >= self.max_length

    def _grade(self, games: Sequence[_Game], step: int) -> list[Score]:
        attempts = [game.attempt(self.params.max_tokens) for game in games]
        with boundary(GraderError, "rubric"):
            return self.rubric.score(attempts, step=step)


@dataclass(slots=True, kw_only=True)
class _Game:
    """An episode while it is played."""

    task: Task
    sample: int
    seed: int
    environment: Environment
    prompt: tuple[int, ...] = ()
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    over: bool = False
    truncated: bool = False

    def attempt(self, max_tokens: int) -> Attempt:
        return Attempt(
            task=self.task,
            messages=tuple(self.messages),
            completion_tokens=tuple(token for turn in self.turns for token in turn.completion.tokens),
            truncated=self.truncated,
            max_tokens=max_tokens,
        )

    def episode(self, score: Score) -> Episode:
        ended = Outcome.TRUNCATED if self.truncated else Outcome.FINISHED
        return Episode(
            task=self.task.id,
            sample=self.sample,
            seed=self.seed,
            messages=(*self.task.messages, *self.messages),
            turns=tuple(self.turns),
            score=score,
            outcome=score.outcome if score.value is None else ended,
        )
