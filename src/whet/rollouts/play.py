"""Playing episodes: environment x sampler x template.

Every episode is a coroutine of its own: it awaits its sampler and its environment, and no other episode. The sampler
batches whatever is awaited at the same time. An episode's tokens are kept as they were sampled: the next turn's prompt
extends them, nothing is decoded and tokenized again. An environment that fails, or a request that the sampler cannot
answer, ends its own episode, unscored.

Grading happens once, for all finished episodes of a call, in a thread: rewards that compare answers or ask a judge see
the same batch whatever the timing was, and the event loop goes on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from whet.envs.base import Attempt, Environment, Rubric, Task
from whet.errors import DataError, EnvironmentFailure, GraderError, SamplerError, boundary
from whet.records import Completion, Ending, Episode, Group, Message, Outcome, Score, Turn, seed_of, token_ids
from whet.rollouts.assemble import to_token_steps
from whet.sampling.base import Request, SamplingParams, TokenSampler
from whet.sampling.bridge import aside, run, together
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
    """An episode that is not over by then is truncated."""

    def play(
        self, tasks: Sequence[Task], samples: int, *, step: int, seed: int, positions: Sequence[int | str] | None = None
    ) -> Played:
        """`play_async` for those who cannot await; also from inside a running event loop, which then waits."""
        return run(self.play_async(tasks, samples, step=step, seed=seed, positions=positions))

    async def play_async(
        self, tasks: Sequence[Task], samples: int, *, step: int, seed: int, positions: Sequence[int | str] | None = None
    ) -> Played:
        """`samples` episodes of each task, graded: one group for each task, in order.

        The random numbers of a turn follow from `seed`, the task's position (`positions`; none: its place among these
        tasks), the sample and the turn alone. `step` is what rewards see as the trainer's step.
        """
        games = [
            _Game(task=task, sample=sample, seed=seed_of(seed, position, sample), samples=samples)
            for task, position in zip(tasks, range(len(tasks)) if positions is None else positions, strict=True)
            for sample in range(samples)
        ]
        began = time.monotonic()
        await together(self._play(game) for game in games)
        played = time.monotonic()
        scores = await aside(partial(self._grade, games, step))
        episodes = [game.episode(score, self.template) for game, score in zip(games, scores, strict=True)]
        groups = tuple(
            Group(task=task.id, episodes=tuple(episodes[i * samples : (i + 1) * samples]))
            for i, task in enumerate(tasks)
        )
        return Played(groups=groups, rollout_s=played - began, score_s=time.monotonic() - played)

    async def _play(self, game: _Game) -> None:
        """One episode from its start to its end."""
        await self._start(game)
        for turn in range(self.max_turns):
            if game.over:
                return
            try:
                completion = await self.sampler.sample(self._request(game, turn))
            except SamplerError as error:
                game.failure, game.blamed, game.over = str(error), Outcome.ENGINE_ERROR, True
            else:
                await self._answer(game, completion)
        game.truncated |= not game.over

    async def _start(self, game: _Game) -> None:
        with game.blaming_environment():
            game.environment = self.environment(game.task)
            game.prompt = self.template.prompt(await game.environment.start())
            if len(game.prompt) >= self.max_length:
                raise DataError(f"the prompt has {len(game.prompt)} tokens, the model attends to {self.max_length}")

    def _request(self, game: _Game, turn: int) -> Request:
        left = min(self.params.max_tokens, self.max_length - len(game.prompt))
        return Request(
            prompt=game.prompt,
            seed=seed_of(game.seed, turn),
            params=replace(self.params, max_tokens=left),
            samples=1 if game.turns else game.samples,
        )

    def _room(self, game: _Game) -> int:
        """Most tokens that its first answer could have: what the sampler may give, or what the prompt left."""
        prompt = game.turns[0].prompt if game.turns else game.prompt
        return min(self.params.max_tokens, self.max_length - len(prompt))

    async def _answer(self, game: _Game, completion: Completion) -> None:
        message = self.template.parse(completion.tokens.tolist(), completion.ending)
        game.turns.append(Turn(prompt=token_ids(game.prompt), completion=completion))
        game.messages.append(message)
        if completion.ending is Ending.LENGTH:
            game.truncated = game.over = True
            return
        with game.blaming_environment():
            observations, game.over = await game.environment.step(message)
            game.messages += observations
            if not game.over:
                # A turn that a stop string ended is closed here: context, since the policy did not write it.
                end = [self.template.turn_end] if completion.ending is Ending.STOP_STRING else []
                game.prompt = self.template.extend((*game.prompt, *completion.tokens.tolist(), *end), observations)
                game.truncated = game.over = len(game.prompt) >= self.max_length

    def _grade(self, games: Sequence[_Game], step: int) -> list[Score]:
        """One score for each game; those that failed are not shown to the rubric."""
        attempts = [game.attempt(self._room(game)) for game in games if not game.failure]
        try:
            with boundary(GraderError, "the rubric failed"):
                scores = iter(self.rubric.score(attempts, step=step))
        except GraderError as error:
            scores = iter([Score(value=None, outcome=Outcome.GRADER_ERROR, note=str(error))] * len(attempts))
        return [
            Score(value=None, outcome=game.blamed, note=game.failure) if game.failure else next(scores)
            for game in games
        ]


@dataclass(slots=True, kw_only=True)
class _Game:
    """An episode while it is played."""

    task: Task
    sample: int
    seed: int
    samples: int
    """Episodes that begin with the same prompt."""
    environment: Environment = field(init=False)
    prompt: tuple[int, ...] = ()
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    over: bool = False
    truncated: bool = False
    failure: str = ""
    """What its environment raised, or did that the template cannot write; or what became of its request."""
    blamed: Outcome = Outcome.ENVIRONMENT_ERROR
    """Whose failure that was."""

    @contextmanager
    def blaming_environment(self) -> Iterator[None]:
        """End the episode where the block fails; the others go on."""
        try:
            with boundary(EnvironmentFailure, "the environment failed"):
                yield
        except (EnvironmentFailure, DataError) as error:
            self.failure, self.over = str(error), True

    def attempt(self, max_tokens: int) -> Attempt:
        return Attempt(
            task=self.task,
            messages=tuple(self.messages),
            completion_tokens=tuple(token for turn in self.turns for token in turn.completion.tokens.tolist()),
            truncated=self.truncated,
            max_tokens=max_tokens,
        )

    def episode(self, score: Score, template: Template) -> Episode:
        answer = next((message.content for message in reversed(self.messages) if message.role == "assistant"), "")
        ended = Outcome.TRUNCATED if self.truncated else score.outcome
        return Episode(
            task=self.task.id,
            sample=self.sample,
            seed=self.seed,
            messages=(*self.task.messages, *self.messages),
            turns=tuple(self.turns),
            score=score,
            outcome=score.outcome if score.value is None else ended,
            steps=to_token_steps(self.turns[-1], answer, score.steps, template.decode) if score.steps else (),
        )
