"""Rollouts: episodes in message space, tokens as they were sampled, and failures that stay with their episode."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest

from whet import Broken
from whet.algorithms.groups import to_atoms, to_rows
from whet.algorithms.policy import informative
from whet.envs.base import Attempt, Observed, Opening, SingleTurn, Task
from whet.envs.rewards.shaping import of_turns
from whet.errors import MissingExtra, RewardError, SamplerError, TrainingError
from whet.models.create import byte_tokenizer
from whet.records import Completion, Ending, Episode, Group, Message, Outcome, Score, TokenRow
from whet.rollouts.feed import Feed
from whet.rollouts.play import Player, _lowest
from whet.sampling.base import Request, SamplingParams, aside, run
from whet.templates.jinja import JinjaTemplate

TEMPLATE = JinjaTemplate(byte_tokenizer())
(STOP,) = TEMPLATE.stop_ids


def task(name: str, text: str = "Guess.") -> Task:
    return Task(id=name, messages=(Message(role="user", content=text),))


@dataclass
class Says:
    """A token sampler that says what a function makes of the request; the log-probabilities count up."""

    script: Callable[[Request], str]
    version: int = 0
    seen: list[Request] = field(default_factory=list)

    async def sample(self, request: Request) -> Completion:
        self.seen.append(request)
        text = TEMPLATE._encoder.one(self.script(request))
        tokens = (*text, STOP)[: request.params.max_tokens]
        logprobs = tuple(-float(len(request.prompt) + at) for at in range(len(tokens)))
        ending = Ending.STOP if tokens[-1] == STOP else Ending.LENGTH
        return Completion(tokens=tokens, logprobs=logprobs, version=self.version, ending=ending)


@dataclass
class Guessing:
    """Three turns: two answers are commented on, the third ends it. It may be told to break."""

    task: Task
    turns: int = 3
    taken: int = 0

    async def start(self, *, seed: int) -> Opening:
        if self.task.id == "no start":
            raise KeyError("board")
        return Opening(messages=self.task.messages)

    async def close(self) -> Mapping[str, float]:
        return {}

    async def step(self, message: Message) -> Observed:
        self.taken += 1
        if message.content == "break":
            raise ZeroDivisionError("in the game")
        if message.content == "extra":
            raise MissingExtra("pip install 'whet[envs]'")
        if message.content == "lost":
            raise Broken("the board is gone")
        if message.content == "forge":
            return Observed(messages=(Message(role="user", content="<|im_end|>"),))
        said = Message(role="user", content=f"Not {message.content}.")
        return Observed(messages=(said,), over=self.taken == self.turns)


@dataclass
class Lengths:
    """Scores an answer by its letters; keeps what it was shown."""

    seen: list[Attempt] = field(default_factory=list)

    def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
        self.seen += attempts
        return [Score(value=float(len(a.answer)), correct=a.answer == "right") for a in attempts]

    def close(self) -> None:
        pass


def player(script: Callable[[Request], str] | str = "no", **changes: object) -> Player:
    sampler = Says(script if callable(script) else lambda _: script)
    settings = {
        "sampler": sampler, "template": TEMPLATE, "environment": Guessing, "rubric": Lengths(), "max_turns": 5,
        "params": SamplingParams(max_tokens=20, stop_ids=TEMPLATE.stop_ids), "max_length": 500,
    }  # fmt: skip
    return Player(**{**settings, **changes})  # type: ignore[arg-type]


def play(of: Player, *names: str, samples: int = 1) -> list[Episode]:
    groups = of.play([task(name) for name in names], samples, step=0, seed=5).groups
    assert [group.task for group in groups] == list(names)
    assert all([e.sample for e in group.episodes] == list(range(samples)) for group in groups)
    return [episode for group in groups for episode in group.episodes]


# -------------------------------------------------------------------------------------------- one episode


def test_a_turn_goes_on_from_the_tokens_of_the_one_before() -> None:
    (episode,) = play(player(), "a")
    assert (episode.outcome, len(episode.turns)) == (Outcome.FINISHED, 3)
    for earlier, later in zip(episode.turns, episode.turns[1:], strict=False):
        so_far = [*earlier.prompt, *earlier.completion.tokens]
        assert later.prompt[: len(so_far)].tolist() == so_far
        between = TEMPLATE.decode(later.prompt[len(so_far) :])
        assert between == "\n<|im_start|>user\nNot no.<|im_end|>\n<|im_start|>assistant\n"
    said = [(message.role, message.content) for message in episode.messages]
    assert said == [("user", "Guess."), *[("assistant", "no"), ("user", "Not no.")] * 3]


def test_every_turn_is_opened_under_the_settings_of_its_task() -> None:
    tokenizer = byte_tokenizer()
    opening = "{{- '<|im_start|>assistant\n' }}"
    own = tokenizer.chat_template.replace(opening, f"{opening}{{%- if quiet %}}{{{{- '(quiet)' }}}}{{%- endif %}}")
    quietly = player(template=JinjaTemplate(tokenizer, chat_template=own))
    for settings, opened in (({}, "assistant\n"), ({"quiet": True}, "assistant\n(quiet)")):
        asked = replace(task("a"), settings=settings)
        (group,) = quietly.play([asked], 1, step=0, seed=5).groups
        turns = group.episodes[0].turns
        assert [TEMPLATE.decode(turn.prompt).rpartition("<|im_start|>")[2] for turn in turns] == [opened] * 3


def test_a_turn_that_a_stop_string_ended_is_closed_for_the_next_one_and_not_trained() -> None:
    class StopsAtString(Says):
        async def sample(self, request: Request) -> Completion:
            whole = await Says.sample(self, request)
            return replace(whole, tokens=whole.tokens[:-1], logprobs=whole.logprobs[:-1], ending=Ending.STOP_STRING)

    (episode,) = play(player(sampler=StopsAtString(lambda _: "no</a>")), "a")
    assert (episode.outcome, len(episode.turns)) == (Outcome.FINISHED, 3)
    assert [m.content for m in episode.messages if m.role == "assistant"] == ["no</a>"] * 3
    (row,) = to_rows(episode)
    trained = [token for token, flag in zip(row.tokens, row.trained, strict=True) if flag]
    assert TEMPLATE.decode(trained) == "no</a>" * 3
    assert TEMPLATE.decode(row.tokens.tolist()).count("no</a><|im_end|>\n<|im_start|>user") == 2


def test_the_row_trains_what_was_sampled_and_nothing_else() -> None:
    (episode,) = play(player(), "a")
    (row,) = to_rows(episode)
    last = episode.turns[-1]
    assert row.tokens.tolist() == [*last.prompt, *last.completion.tokens]
    assert row.shared == len(episode.turns[0].prompt)
    trained = [token for token, flag in zip(row.tokens, row.trained, strict=True) if flag]
    assert TEMPLATE.decode(trained) == "no<|im_end|>" * 3
    sampled = [logp for turn in episode.turns for logp in turn.completion.logprobs]
    assert row.columns["sampler_logp"].tolist() == sampled
    assert sampled == [-float(at) for at, flag in enumerate(row.trained) if flag]


def test_a_row_is_the_same_in_another_process_and_says_once_what_holds_for_all_of_its_tokens() -> None:
    tokens = np.arange(1001)
    trained = tokens > 0
    numbers = {
        "advantage": np.full(1000, -0.0), "weight": np.full(1000, np.nan), "zeros": np.array([0.0, -0.0] * 500),
        "logp": np.linspace(0, 1, 1000, dtype=np.float32), "top_k": np.ones((1000, 2)), "ids": np.ones((1000, 3), int),
    }  # fmt: skip
    row = TokenRow(tokens=tokens, trained=trained, columns=numbers, shared=1)
    sent = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
    assert pickle.loads(sent) == row and not pickle.loads(sent).columns["advantage"].flags.writeable
    assert len(sent) < 1001 * (4 + 1) + 1000 * (8 + 4) + 1000
    one = TokenRow(tokens=[1, 2], trained=[False, True], columns={"advantage": [2.0]})
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_rewritten_history_begins_a_new_row() -> None:
    (episode,) = play(player(), "a")
    first, second, third = episode.turns
    rewritten = replace(episode, turns=(first, second, replace(third, prompt=first.prompt)))
    rows = to_rows(rewritten)
    assert [row.shared for row in rows] == [len(first.prompt), 0]
    assert [row.trained_count for row in rows] == [6, 3]
    assert len(to_atoms(rows)) == 2


def test_answers_to_one_prompt_are_one_atom() -> None:
    episodes = play(player(lambda request: str(request.seed % 7)), "a", "b", samples=3)
    (other,) = player().play([task("c", "Guess again.")], 1, step=0, seed=0).groups[0].episodes
    atoms = to_atoms([row for episode in (*episodes, other) for row in to_rows(episode)])
    assert [len(atom.rows) for atom in atoms] == [6, 1]


def test_a_cut_answer_ends_the_episode_and_is_still_graded() -> None:
    table = player("a very long answer", params=SamplingParams(max_tokens=5, stop_ids=TEMPLATE.stop_ids))
    (episode,) = play(table, "a")
    assert (episode.outcome, len(episode.turns), episode.score.value) == (Outcome.TRUNCATED, 1, 5.0)
    assert episode.turns[0].completion.ending is Ending.LENGTH
    assert STOP not in episode.turns[0].completion.tokens
    assert [m.role for m in episode.messages] == ["user", "assistant"]
    (attempt,) = table.rubric.seen  # type: ignore[attr-defined]
    assert attempt.truncated and list(attempt.completion_tokens) == episode.turns[0].completion.tokens.tolist()


def test_no_request_goes_beyond_what_the_model_attends_to() -> None:
    """The first turn ends at 20 tokens of prompt + 3; the second prompt would not fit into 24, but does into 60."""
    length = len(TEMPLATE.prompt(task("a").messages))
    for max_length, turns in ((length + 10, 1), (length + 34, 2)):
        table = player(max_length=max_length)
        (episode,) = play(table, "a")
        assert (episode.outcome, len(episode.turns)) == (Outcome.TRUNCATED, turns)
        for request in table.sampler.seen:  # type: ignore[attr-defined]
            assert len(request.prompt) + request.params.max_tokens <= max_length
        # What the rewards see as the limit is what the first prompt left, where that is less than the sampler's.
        (attempt,) = table.rubric.seen  # type: ignore[attr-defined]
        assert attempt.max_tokens == min(20, max_length - length)


def test_a_turn_that_was_cut_says_nothing_of_how_far_the_play_is() -> None:
    """Its environment never saw it: with progress the play stays where it was, and does not fall back to 0."""

    class Far(Guessing):
        async def step(self, message: Message) -> Observed:
            return replace(await super().step(message), reward=0.5 * self.taken)

    seen: list[Attempt] = []

    class Keeps(Lengths):
        def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
            seen.extend(attempts)
            return super().score(attempts, step=step)

    texts = iter(["a", "b", "c" * 50])
    play(player(lambda _: next(texts), environment=Far, rubric=Keeps()), "a")
    assert seen[0].truncated and seen[0].turn_rewards == (0.5, 1.0, None)
    assert of_turns(seen[0], progress=True, smear=0.0).turns == (0.5, 0.5, 0.0)


def test_an_episode_that_is_not_over_in_time_is_truncated() -> None:
    (episode,) = play(player(max_turns=2), "a")
    assert (episode.outcome, len(episode.turns)) == (Outcome.TRUNCATED, 2)
    (episode,) = play(player(max_turns=3), "a")
    assert (episode.outcome, len(episode.turns)) == (Outcome.FINISHED, 3)


def test_episodes_do_not_wait_for_one_another() -> None:
    """The first one's environment answers once the other episode has ended, three turns later."""
    ended = asyncio.Event()

    class Slow(Guessing):
        async def step(self, message: Message) -> Observed:
            if self.task.id == "slow":
                await asyncio.wait_for(ended.wait(), 20)
            observed = await super().step(message)
            if self.task.id == "quick" and observed.over:
                ended.set()
            return observed

    for episode in play(player(environment=Slow), "slow", "quick"):
        assert (episode.outcome, len(episode.turns)) == (Outcome.FINISHED, 3)


def test_it_plays_inside_a_running_event_loop() -> None:
    async def notebook() -> tuple[list[Episode], list[Episode]]:
        played = await player().play_async([task("a")], 2, step=0, seed=5)
        return play(player(), "a", samples=2), list(played.groups[0].episodes)

    aside, here = asyncio.run(notebook())
    assert aside == here == play(player(), "a", samples=2)


def test_a_turn_s_random_numbers_follow_from_its_position() -> None:
    """Not from the place in a call: the second of three tasks draws what it draws when it is played alone."""
    whole, alone = player(), player()
    whole.play([task(name) for name in "abc"], 2, step=0, seed=5, positions=[10, 11, 12])
    alone.play([task("b")], 2, step=7, seed=5, positions=[11])
    seeds = {request.seed for request in alone.sampler.seen}  # type: ignore[attr-defined]
    assert seeds < {request.seed for request in whole.sampler.seen}  # type: ignore[attr-defined]
    assert len(seeds) == 2 * 3


# ---------------------------------------------------------------------------------------------- failures


def test_plays_that_branch_share_their_first_turns_and_sample_them_once() -> None:
    sampler = Says(lambda request: f"{request.seed % 10**6}")
    of = player(branches=(2, 3))
    episodes = play(replace(of, sampler=sampler), "a", "b", samples=6)
    assert len(sampler.seen) == 2 * (2 + 6 + 6)  # of three turns the first two branch
    assert [request.samples for request in sampler.seen[:2]] == [2, 2]
    for group in (episodes[:6], episodes[6:]):
        turns = [[turn.completion.tokens.tobytes() for turn in episode.turns] for episode in group]
        assert [len({path[0] for path in turns[first : first + 3]}) for first in (0, 3)] == [1, 1]
        assert [len({path[depth] for path in turns}) for depth in range(3)] == [2, 6, 6]
    again = play(replace(of, sampler=Says(sampler.script)), "a", "b", samples=6)
    assert [e.messages for e in again] == [e.messages for e in episodes]


def test_a_request_that_fails_in_the_sampler_ends_its_own_episode_only() -> None:
    table = player(lambda request: "no")
    answer = table.sampler.sample

    async def failing(request: Request) -> Completion:
        if request.seed % 3 == 0:
            raise SamplerError("lost")
        return await answer(request)

    table.sampler.sample = failing  # type: ignore[method-assign]
    episodes = play(table, "a", "b", samples=6)
    failed = [episode for episode in episodes if episode.outcome is Outcome.ENGINE_ERROR]
    assert 0 < len(failed) < 12
    assert all(episode.score.value is None and episode.score.note == "lost" for episode in failed)
    assert all(e.outcome is Outcome.FINISHED and e.score.value is not None for e in episodes if e not in failed)
    assert len(table.rubric.seen) == 12 - len(failed)  # type: ignore[attr-defined]


def some(said: str) -> Player:
    """Some of the episodes say this, the others "no"."""
    table = player(lambda request: said if request.seed % 2 and len(table.sampler.seen) > 4 else "no")  # type: ignore[attr-defined]
    return table


def test_what_a_step_raises_is_the_policy_s_fault_and_scored_lowest() -> None:
    table = some("break")
    episodes = play(table, "a", "b", samples=4)
    failed = [episode for episode in episodes if episode.outcome is Outcome.POLICY_ERROR]
    assert 0 < len(failed) < 8
    for episode in failed:
        assert (episode.score.value, episode.score.correct) == (0.0, False)
        assert episode.score.note == "the environment failed: ZeroDivisionError: in the game"
        assert episode.turns[-1].completion.tokens[0] == TEMPLATE._encoder.one("break")[0]
    assert all(e.outcome is Outcome.FINISHED and e.score.value == 2.0 for e in episodes if e not in failed)
    assert sum(len(Group(task="", episodes=tuple(episodes[i : i + 4])).scored) for i in (0, 4)) == 8


@pytest.mark.parametrize(
    ("others", "correct"),
    [
        ([], False),
        ([Score(value=1.0, correct=True), Score(value=2.0)], False),
        ([Score(value=None)], False),
        ([Score(value=1.0), Score(value=None)], None),
    ],
)
def test_where_no_reward_judges_the_lowest_score_is_no_verdict(others: list[Score], correct: bool | None) -> None:
    assert _lowest(others).correct is correct


def test_an_environment_that_is_broken_is_unscored() -> None:
    table = some("lost")
    episodes = play(table, "a", "b", samples=4)
    failed = [episode for episode in episodes if episode.outcome is Outcome.ENVIRONMENT_ERROR]
    assert 0 < len(failed) < 8
    assert all(episode.score.value is None and episode.score.note == "the board is gone" for episode in failed)
    assert all(e.outcome is Outcome.FINISHED and e.score.value == 2.0 for e in episodes if e not in failed)
    assert len(table.rubric.seen) == 8 - len(failed)  # type: ignore[attr-defined]


def test_what_broke_once_is_played_again_with_the_same_seeds() -> None:
    class Flaky(Guessing):
        broke: ClassVar[set[str]] = set()

        async def step(self, message: Message) -> Observed:
            if self.taken == 1 and self.task.id not in self.broke:
                self.broke.add(self.task.id)
                raise Broken("lost")
            return await super().step(message)

    assert play(player(environment=Flaky), "a", "b") == play(player(), "a", "b")


def test_observations_forge_no_token() -> None:
    for episode in play(player("forge", max_turns=2), "a", samples=2):
        observed = episode.turns[1].prompt[len(episode.turns[0].prompt) + len(episode.turns[0].completion.tokens) :]
        assert TEMPLATE.decode(observed.tolist()).count("<|im_end|>") == 2 and observed.tolist().count(STOP) == 1
        assert episode.score.value is not None


def test_an_environment_that_cannot_start_has_an_episode_without_turns() -> None:
    broken, whole = play(player(), "no start", "a")
    assert (broken.outcome, broken.turns, to_rows(broken)) == (Outcome.ENVIRONMENT_ERROR, (), [])
    assert broken.score.note == "the environment failed: KeyError: 'board'"
    assert whole.outcome is Outcome.FINISHED
    (long,) = play(player(max_length=10), "a")
    assert (long.outcome, long.turns) == (Outcome.ENVIRONMENT_ERROR, ())
    assert "the model attends to 10" in long.score.note

    def unbuildable(_: Task) -> Guessing:
        raise OSError("no such board")

    (unbuilt,) = play(player(environment=unbuildable), "a")
    assert unbuilt.score.note == "the environment failed: OSError: no such board"


def test_what_the_user_must_mend_stops_the_run() -> None:
    with pytest.raises(MissingExtra):
        play(player("extra"), "a")


def test_a_rubric_that_fails_scores_nobody() -> None:
    class Broken(Lengths):
        def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
            raise ValueError("oops")

    for episode in play(player(rubric=Broken()), "a", samples=2):
        assert (episode.outcome, episode.score.value) == (Outcome.GRADER_ERROR, None)
        assert episode.score.note == "the rubric failed: ValueError: oops"


# ------------------------------------------------------------------------------------------------- seeds


def test_an_episode_s_seed_is_its_place_and_its_turn_s_seed_its_number() -> None:
    table = player()
    first = play(table, "a", "b", samples=3)
    requests = [(r.prompt, r.seed) for r in table.sampler.seen]  # type: ignore[attr-defined]
    assert len({seed for _, seed in requests}) == 2 * 3 * 3
    again = player()
    assert play(again, "a", "b", samples=3) == first
    assert [(r.prompt, r.seed) for r in again.sampler.seen] == requests  # type: ignore[attr-defined]
    # More samples, or another task after it, change nothing for those that were there.
    wider = play(player(), "a", "c", samples=4)
    assert [e.seed for e in wider[:3]] == [e.seed for e in first[:3]]


# -------------------------------------------------------------------------------------------------- feed


def feed(script: Callable[[Request], str] | str = "right", *, position: int = 0, tasks: int = 5) -> Feed:
    table = player(script, environment=SingleTurn)
    listed = [task(f"t{number}", f"Question {number}") for number in range(tasks)]

    def hand_over(version: int) -> None:
        table.sampler.version = version  # type: ignore[misc]

    return Feed(player=table, tasks=listed, samples=2, steps=100, seed=3, hand_over=hand_over, position=position)


def names(groups: Sequence[Group]) -> list[str]:
    return [group.task for group in groups]


def test_every_epoch_is_every_task_once_in_an_order_of_its_own() -> None:
    source = feed()
    handed = [name for step in range(4) for name in names(source.take(5, step=step).groups)]
    epochs = [tuple(handed[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(epoch) == ["t0", "t1", "t2", "t3", "t4"] for epoch in epochs)
    assert len(set(epochs)) > 1
    assert source.position == 20


def test_the_position_is_all_that_a_resumed_feed_needs() -> None:
    whole = feed(lambda request: str(request.seed))
    for step in range(5):
        at = whole.position
        taken = whole.take(3, step=step)
        resumed = feed(lambda request: str(request.seed), position=at)
        assert resumed.take(3, step=step).groups == taken.groups
        assert resumed.position == whole.position


def test_what_teaches_nothing_is_left_out_counted_and_replaced() -> None:
    """Tasks 0, 1 and 2 are always answered right, 3 and 4 every other time."""

    def script(request: Request) -> str:
        hard = TEMPLATE.decode(request.prompt).split("Question ")[1][0] in "34"
        return "wrong" if hard and request.seed % 2 else "right"

    source = feed(script)
    taken = source.take(4, step=0, keep=informative, rounds=20)
    assert len(taken.groups) == 4 and set(names(taken.groups)) == {"t3", "t4"}
    assert {"t0", "t1", "t2"} <= set(names(taken.left_out))
    assert source.position == len(taken.played) == len(taken.groups) + len(taken.left_out)
    assert 2 <= taken.rounds <= 20
    few = feed("right").take(4, step=0, keep=informative, rounds=3)
    assert (few.groups, len(few.left_out), few.rounds) == ((), 12, 3)


def test_dynamic_sampling_looks_at_correctness_not_at_the_shaped_reward() -> None:
    """Both answers are wrong, and one is longer: the rewards differ, and nothing is to be learned about the task."""
    taken = feed(lambda request: "x" * (1 + request.seed % 5)).take(5, step=0, keep=informative)
    rewards = [{episode.score.value for episode in group.episodes} for group in taken.left_out]
    assert not taken.groups and any(len(values) == 2 for values in rewards)


def test_a_hand_over_that_does_not_arrive_is_noticed() -> None:
    source = feed()
    source.publish(4)
    assert source.take(1, step=0).groups[0].episodes[0].turns[0].completion.version == 4
    source.hand_over = lambda version: None
    with pytest.raises(TrainingError, match="weights of version 5 were handed over, but the sampler has 4"):
        source.publish(5)


def test_nothing_scored_three_times_in_a_row_stops_the_run() -> None:
    class Moody(Lengths):
        def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
            if step in (2, 5):
                return super().score(attempts, step=step)
            return [Score(value=None, outcome=Outcome.GRADER_TIMEOUT, note=f"judge: late in {step}")] * len(attempts)

    source = feed()
    source.player = replace(source.player, rubric=Moody())
    for step in range(8):
        assert sum(len(group.scored) for group in source.take(2, step=step).groups) == (4 if step in (2, 5) else 0)
    text = "no answer of the last 3 steps could be scored; the last one: grader_timeout: judge: late in 8"
    with pytest.raises(RewardError, match=text):
        source.take(2, step=8)


def test_who_is_asked_to_stop_at_once_does_not_wait_for_a_grader() -> None:
    code = """
import os, signal, time
from whet.sampling.base import aside, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background begins with it ignored
def grade():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
run(aside(grade))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")


def test_what_a_grader_raises_reaches_who_waits_for_it() -> None:
    with pytest.raises(ZeroDivisionError):
        run(aside(lambda: 1 // 0))
    assert run(aside(lambda: 7)) == 7
