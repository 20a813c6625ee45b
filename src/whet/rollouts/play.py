"""Playing episodes: environment x sampler x template.

Every episode is a coroutine of its own: it awaits its sampler and its environment, and no other episode. The sampler
batches whatever is awaited at the same time. An episode's tokens are kept as they were sampled: the next turn's prompt
extends them, nothing is decoded and tokenized again. An environment that the policy's own message broke ends its own
episode, scored lowest; one whose machinery failed is tried once more, and then unscored, as is an episode whose request
the sampler cannot answer.

Grading happens once, for all finished episodes of a call, in a thread: rewards that compare answers or ask a judge see
the same batch whatever the timing was, and the event loop goes on meanwhile. Slow rewards that grade each answer by
itself begin earlier (`ahead`), with the same scores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from whet.envs.base import Attempt, Environment, Observed, Rubric, Task
from whet.envs.endpoint.worker import TURNS
from whet.envs.rubric import Ahead, WeightedRubric
from whet.errors import DataError, EnvironmentFailure, GraderError, PolicyFault, SamplerError, UserError, boundary
from whet.records import (
    Completion,
    Ending,
    Episode,
    Group,
    Message,
    Outcome,
    Score,
    StepScore,
    TokenStep,
    Turn,
    seed_of,
    token_ids,
)
from whet.rollouts.ahead import GRADING, GradesAhead
from whet.sampling.base import Request, SamplingParams, TokenSampler, aside, run, together
from whet.serving.base import call_id
from whet.templates.base import Template
from whet.templates.places import completing_tokens


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
    observation_tokens: int | None = None
    """Of a longer observation the middle is left out."""
    branches: tuple[int, ...] = ()
    """In how many ways each of the first turns is written after those before it; none: plays have nothing in common."""

    def play(
        self, tasks: Sequence[Task], samples: int, *, step: int, seed: int, positions: Sequence[int | str] | None = None
    ) -> Played:
        """`play_async` for synchronous callers; also inside a running event loop, which then waits."""
        return run(self.play_async(tasks, samples, step=step, seed=seed, positions=positions))

    async def play_async(
        self,
        tasks: Sequence[Task],
        samples: int,
        *,
        step: int,
        seed: int,
        positions: Sequence[int | str] | None = None,
        version: int | None = None,
    ) -> Played:
        """`samples` episodes of each task, graded: one group for each task, in order.

        The random numbers of a turn follow from `seed`, the task's position (`positions`; none: its place among these
        tasks), the sample and the turn alone; with `branches`, those of turns that plays share are the same. `step` is
        what rewards see as the trainer's step.
        """
        common: dict[tuple[tuple[int, ...], int], asyncio.Task[Completion]] = {}
        games = [
            _Game(
                task=task,
                sample=sample,
                seed=seed_of(seed, position, "branches" if self.branches else sample),
                samples=self.branches[0] if self.branches else samples,
                path=path_of(sample, self.branches),
                common=common,
                version=version,
            )
            for task, position in zip(tasks, range(len(tasks)) if positions is None else positions, strict=True)
            for sample in range(samples)
        ]
        ahead = self._ahead(step)
        began = time.monotonic()
        try:
            games = await together(self._episode(game, number, ahead) for number, game in enumerate(games))
        except BaseException:
            if ahead is not None:
                ahead.cancel()
            for shared in common.values():
                shared.cancel()
            raise
        played = time.monotonic()
        if ahead is not None:
            await ahead.end()
        scores = await aside(partial(self._grade, games, step, {} if ahead is None else ahead.known))
        episodes = [game.episode(score, self.template) for game, score in zip(games, scores, strict=True)]
        groups = tuple(
            Group(task=task.id, episodes=tuple(episodes[i * samples : (i + 1) * samples]))
            for i, task in enumerate(tasks)
        )
        return Played(groups=groups, rollout_s=played - began, score_s=time.monotonic() - played)

    def _ahead(self, step: int) -> GradesAhead | None:
        if isinstance(self.rubric, WeightedRubric) and self.rubric.slow:
            return GradesAhead(self.rubric, step=step)
        return None

    async def _episode(self, game: _Game, number: int, ahead: GradesAhead | None) -> _Game:
        """The game, played; where the machinery failed, once more from its start with the same seeds."""
        again = replace(game, messages=[], turns=[], turn_rewards=[])
        await self._play(game)
        if game.failure and game.blamed is Outcome.ENVIRONMENT_ERROR:
            await self._play(again)
            game = again
        if ahead is not None and not game.failure:
            ahead.add(number, game.attempt(self._room(game)))
        return game

    async def _play(self, game: _Game) -> None:
        """One episode from its start to its end."""
        await self._start(game)
        for turn in range(self.max_turns):
            if game.over:
                break
            try:
                completion = await self._sample(game, turn)
            except SamplerError as error:
                game.failure, game.blamed, game.over = str(error), Outcome.ENGINE_ERROR, True
            else:
                await self._answer(game, completion)
        game.truncated |= not game.over
        if game.environment is not None:
            with game.blaming_environment():
                game.end(await game.environment.close())

    async def _start(self, game: _Game) -> None:
        with game.blaming_environment():
            game.environment = self.environment(game.task)
            opening = await game.environment.start(seed=game.seed)
            game.asked, game.tools, game.state = opening.messages, opening.tools, opening.state
            game.prompt = self.template.prompt(
                opening.messages, opening.tools, settings=game.task.settings, untrusted=True
            )
            if len(game.prompt) >= self.max_length:
                raise DataError(f"the prompt has {len(game.prompt)} tokens, the model attends to {self.max_length}")

    async def _sample(self, game: _Game, turn: int) -> Completion:
        """The turn; one that plays share is sampled once."""
        request = self._request(game, turn)
        if turn >= len(game.path):
            return await self.sampler.sample(request)
        key = game.prompt, request.seed
        if key not in game.common:
            game.common[key] = asyncio.ensure_future(self.sampler.sample(request))
        return await asyncio.shield(game.common[key])

    def _request(self, game: _Game, turn: int) -> Request:
        left = min(self.params.max_tokens, self.max_length - len(game.prompt))
        stop = (*self.params.stop, *self.template.stops(game.tools))
        return Request(
            prompt=game.prompt,
            seed=seed_of(game.seed, turn, *game.path[: turn + 1]),
            params=replace(self.params, max_tokens=left, stop=stop),
            samples=self.branches[turn] if turn < len(self.branches) else 1 if turn else game.samples,
            goes_on=turn + 1 < self.max_turns,
            version=game.version,
        )

    def _room(self, game: _Game) -> int:
        """Most tokens that its first answer could have: what the sampler may give, or what the prompt left."""
        prompt = game.turns[0].prompt if game.turns else game.prompt
        return min(self.params.max_tokens, self.max_length - len(prompt))

    async def _answer(self, game: _Game, completion: Completion) -> None:
        message = self.template.parse(completion.tokens.tolist(), completion.ending, game.tools)
        place = (game.seed, "call", len(game.turns))
        calls = (replace(call, id=call_id(*place, n)) for n, call in enumerate(message.tool_calls))
        message = replace(message, tool_calls=tuple(calls))
        game.turns.append(Turn(prompt=token_ids(game.prompt), completion=completion, state=game.state))
        game.messages.append(message)
        game.turn_rewards.append(None)
        if completion.ending is Ending.LENGTH:
            game.truncated = game.over = True
            return
        assert game.environment is not None, "it was started"
        with game.blaming_environment(of_step=True):
            observed = await game.environment.step(message)
            game.messages[-1] = replace(message, tool_calls=observed.calls or message.tool_calls)
            game.turn_rewards[-1] = observed.reward
            game.over, game.state = observed.over, observed.state
            observations = [self._shortened(each) for each in observed.messages]
            game.messages += observations
            if not game.over:
                game.prompt = self._next_prompt(game, observed, observations)
                game.truncated = game.over = len(game.prompt) >= self.max_length

    def _next_prompt(self, game: _Game, observed: Observed, observations: Sequence[Message]) -> tuple[int, ...]:
        """What the policy answers next: the turn as it was sampled with what followed, or another conversation."""
        turn, opens = game.turns[-1], observed.opens
        if opens is not None:
            game.tools, observations = opens.tools, opens.messages
            # Earlier answers in it are known from their turns: here are those messages that no turn has.
            last = max((n for n, each in enumerate(observations, start=1) if each.role == "assistant"), default=0)
            game.messages += observations[last:]
            if opens.after is None:
                return self.template.prompt(observations, opens.tools, settings=game.task.settings, untrusted=True)
            turn = game.turns[opens.after]
        # A turn that a stop string ended is closed here: context, since the policy did not write it. One that called
        # inline goes on behind its result.
        inline = self.template.stops(game.tools) and observations and observations[0].role == "tool"
        end = [self.template.turn_end] if turn.completion.ending is Ending.STOP_STRING and not inline else []
        written = (*turn.prompt.tolist(), *turn.completion.tokens.tolist(), *end)
        return self.template.extend(written, observations, settings=game.task.settings)

    def _shortened(self, observation: Message) -> Message:
        most = self.observation_tokens
        text = observation.content if most is None else self.template.shorten(observation.content, most)
        return replace(observation, content=text)

    def _grade(self, games: Sequence[_Game], step: int, known: Mapping[int, Ahead]) -> list[Score]:
        """One score for each game; those that failed are not shown to the rubric. `known`: what was graded ahead."""
        attempts = [game.attempt(self._room(game)) for game in games if not game.failure]
        ahead = [known.get(number, {}) for number, game in enumerate(games) if not game.failure] if known else []
        try:
            with GRADING, boundary(GraderError, "the rubric failed"):
                if isinstance(self.rubric, WeightedRubric):
                    scores = self.rubric.score(attempts, step=step, ahead=ahead)
                else:
                    scores = self.rubric.score(attempts, step=step)
        except GraderError as error:
            scores = [Score(value=None, outcome=Outcome.GRADER_ERROR, note=str(error))] * len(attempts)
        lowest, given = _lowest(scores), iter(scores)
        return [
            next(given)
            if not game.failure
            else replace(lowest, note=game.failure)
            if game.blamed is Outcome.POLICY_ERROR
            else Score(value=None, outcome=game.blamed, note=game.failure)
            for game in games
        ]


def to_token_steps(
    turn: Turn, answer: str, steps: Sequence[StepScore], decode: Callable[[Sequence[int]], str]
) -> tuple[TokenStep, ...]:
    """The steps of an answer at the sampled tokens that complete them; nothing is tokenized again.

    `answer` is what the turn's tokens spell, or a part of that.
    """
    lasts = completing_tokens(turn.completion.tokens.tolist(), answer, [step.end for step in steps], decode)
    return tuple(TokenStep(last=last, value=step.value) for last, step in zip(lasts, steps, strict=True))


def _lowest(scores: Sequence[Score]) -> Score:
    """The score of an answer that broke its environment: the lowest of the others' values and parts, at most 0."""
    graded = [score for score in scores if score.value is not None]
    values = [score.value for score in graded if score.value is not None]
    judged = not graded or any(score.correct is not None for score in graded)
    parts: dict[str, float | None] = {}
    for name in dict.fromkeys(name for score in scores for name in score.parts):
        known = (score.parts.get(name) for score in scores)
        parts[name] = min([0.0, *(value for value in known if value is not None)])
    return Score(
        value=min([0.0, *values]), parts=parts, correct=False if judged else None, outcome=Outcome.POLICY_ERROR
    )


def path_of(sample: int, branches: Sequence[int]) -> tuple[int, ...]:
    """Which way a play goes at each branching: the digits of its number."""
    path = []
    for ways in reversed(branches):
        sample, way = divmod(sample, ways)
        path.append(way)
    return tuple(reversed(path))


@dataclass(slots=True, kw_only=True)
class _Game:
    """An episode while it is played."""

    task: Task
    sample: int
    seed: int
    samples: int
    """First turns that are sampled after the same prompt."""
    path: tuple[int, ...] = ()
    """Which way each of the turns goes where plays part."""
    common: dict[tuple[tuple[int, ...], int], asyncio.Task[Completion]] = field(default_factory=dict)
    """The turns that plays share, by prompt and seed."""
    version: int | None = None
    """Of the weights that it is sampled with; None: the newest."""
    environment: Environment | None = None
    asked: tuple[Message, ...] = ()
    """What the environment began with."""
    tools: tuple[dict[str, Any], ...] = ()
    state: str | None = None
    prompt: tuple[int, ...] = ()
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    turn_rewards: list[float | None] = field(default_factory=list)
    worth: Mapping[str, float] = field(default_factory=dict)
    over: bool = False
    truncated: bool = False
    failure: str = ""
    """What its environment raised, or did that the template cannot write; or what became of its request."""
    blamed: Outcome = Outcome.ENVIRONMENT_ERROR
    """Whose failure that was."""

    @contextmanager
    def blaming_environment(self, *, of_step: bool = False) -> Iterator[None]:
        """End the episode where the block fails; the others go on. What a step raises, its message caused."""
        try:
            yield
        except (EnvironmentFailure, DataError) as error:
            self._fail(Outcome.ENVIRONMENT_ERROR, str(error))
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's environment raises ends this episode only
            broken = of_step or isinstance(error, PolicyFault)
            said = str(error) if isinstance(error, PolicyFault) else f"{type(error).__name__}: {error}"
            self._fail(Outcome.POLICY_ERROR if broken else Outcome.ENVIRONMENT_ERROR, f"the environment failed: {said}")

    def end(self, worth: Mapping[str, float | Sequence[float]]) -> None:
        """Keep what the play was worth, and its turns where that is known only now."""
        self.worth = {name: part for name, part in worth.items() if not isinstance(part, Sequence)}
        turns = worth.get(TURNS, ())
        if isinstance(turns, Sequence) and turns:
            if len(turns) > len(self.turns):
                raise EnvironmentFailure(f"{len(turns)} rewards of turns were given; the play has {len(self.turns)}")
            self.turn_rewards = [*turns, *self.turn_rewards[len(turns) :]]

    def _fail(self, blamed: Outcome, why: str) -> None:
        if not self.failure:
            self.failure, self.blamed, self.over = why, blamed, True

    def attempt(self, max_tokens: int) -> Attempt:
        return Attempt(
            task=self.task,
            messages=tuple(self.messages),
            completion_tokens=tuple(token for turn in self.turns for token in turn.completion.tokens.tolist()),
            truncated=self.truncated,
            max_tokens=max_tokens,
            worth=self.worth,
            turn_rewards=tuple(self.turn_rewards),
        )

    def episode(self, score: Score, template: Template) -> Episode:
        answer = next((message.content for message in reversed(self.messages) if message.role == "assistant"), "")
        ended = Outcome.TRUNCATED if self.truncated else score.outcome
        return Episode(
            task=self.task.id,
            sample=self.sample,
            seed=self.seed,
            messages=(*(self.asked or self.task.messages), *self.messages),
            turns=tuple(self.turns),
            score=score,
            outcome=score.outcome if score.value is None else ended,
            steps=to_token_steps(self.turns[-1], answer, score.steps, template.decode) if score.steps else (),
        )
