"""Grading while others are still sampled: the same scores, and it does happen."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from whet.envs.base import Attempt, Grade, PlainReward, SingleTurn, Task
from whet.envs.rewards.function import FunctionReward
from whet.envs.rewards.rows import RowVerifier
from whet.envs.rubric import WeightedRubric
from whet.models.create import byte_tokenizer
from whet.records import Completion, Ending, Message
from whet.rollouts.play import Played, Player
from whet.sampling.base import Request, SamplingParams
from whet.templates.jinja import JinjaTemplate

TEMPLATE = JinjaTemplate(byte_tokenizer())
(STOP,) = TEMPLATE.stop_ids


def task(name: str) -> Task:
    question = Message(role="user", content=f"{name}?")
    return Task(id=name, messages=(question,), columns={"answer": "7", "verifier": "exact"})


def compute_score(data_source: str, solution_str: str, ground_truth: str) -> float:
    if "raise" in solution_str:
        raise RuntimeError("no such answer")
    return float(len(solution_str))


def compared(completions: Sequence[Any], **_: Any) -> list[float]:
    """TRL's form: depends on all answers of the call."""
    return [len(each) - max(map(len, completions)) / 2 for each in map(str, completions)]


def shaped(attempt: Attempt) -> Grade:
    """Knows the verdict; breaks on some answers."""
    if attempt.answer.endswith("odd"):
        raise ValueError("odd")
    return Grade(value=0.5 if attempt.correct else -float(len(attempt.answer)))


def rubric(*, judging: str = "rows") -> WeightedRubric:
    judge = {
        "rows": lambda: RowVerifier(name="rows", weight=2.0),
        "compared": lambda: FunctionReward(name="all", weight=1.0, path=compared, deadline_s=9, judges=True),
        "none": lambda: FunctionReward(name="all", weight=1.0, path=compared, deadline_s=9),
    }[judging]()
    own = FunctionReward(name="own", weight=1.0, path=compute_score, deadline_s=9)
    plain = PlainReward(name="plain", weight=1.0, judges=False, function=shaped)
    return WeightedRubric([plain, own, judge])


def attempts(seed: int) -> list[Attempt]:
    draw = random.Random(seed)
    said = ["7", "<answer>7</answer>", "8 raise", "raise", "an odd", "no", "7 odd", ""]
    return [
        Attempt(
            task=task(draw.choice("ab")), messages=(Message(role="assistant", content=draw.choice(said)),),
            completion_tokens=(1,), truncated=False, max_tokens=9,
        )
        for _ in range(12)
    ]  # fmt: skip


@pytest.mark.parametrize("judging", ["rows", "compared", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_any_part_graded_ahead_in_any_order_gives_the_same_scores(seed: int, judging: str) -> None:
    grading, draw, answers = rubric(judging=judging), random.Random(seed), attempts(seed)
    whole = grading.score(answers, step=1)
    assert any(score.value is None for score in whole) or any(score.outcome != whole[0].outcome for score in whole)
    order = draw.sample(range(len(answers)), draw.randrange(1, len(answers)))
    ahead: list[Any] = [{} for _ in answers]
    while order:
        some, order = order[:3], order[3:]
        for place, said in zip(some, grading.ahead([answers[place] for place in some], step=1), strict=True):
            ahead[place] = said
    assert grading.score(answers, step=1, ahead=ahead) == whole
    assert grading.slow is False or judging != "compared"
    grading.close()


@dataclass
class InTurns:
    """Says how often it was asked, and ends a request only when `may_end` lets it."""

    may_end: Callable[[int], asyncio.Event]
    version: int = 0
    seen: int = field(default=0)

    async def sample(self, request: Request) -> Completion:
        number, self.seen = self.seen, self.seen + 1
        await asyncio.wait_for(self.may_end(number).wait(), 60)
        tokens = (*TEMPLATE._encoder.one(f"number {number}"), STOP)
        return Completion(tokens=tokens, logprobs=(-1.0,) * len(tokens), version=0, ending=Ending.STOP)


async def played(count: int, *, one_after_another: bool) -> tuple[Played, list[str], list[str]]:
    """Each episode may end only when the one before it has been graded, or all at once; and the order of grading."""
    loop, events, graded, threads = asyncio.get_running_loop(), [asyncio.Event() for _ in range(count)], [], []

    def score(attempt: Attempt) -> Grade:
        number = int(attempt.answer.split()[-1])
        graded.append(attempt.answer)
        threads.append(threading.current_thread().name)
        if number + 1 < count:
            loop.call_soon_threadsafe(events[number + 1].set)
        return Grade(value=float(number))

    for event in events[: 1 if one_after_another else count]:
        event.set()
    player = Player(
        sampler=InTurns(may_end=events.__getitem__), template=TEMPLATE, environment=SingleTurn,
        rubric=WeightedRubric([PlainReward(name="own", weight=1.0, judges=True, function=score)]),
        params=SamplingParams(max_tokens=40), max_length=200,
    )  # fmt: skip
    return await player.play_async([task("a"), task("b")], count // 2, step=0, seed=0), graded, threads


def test_an_episode_that_waits_for_the_grade_of_another_is_played() -> None:
    found, graded, threads = asyncio.run(played(6, one_after_another=True))
    same, _, _ = asyncio.run(played(6, one_after_another=False))
    assert graded[:5] == [f"number {number}" for number in range(5)] and len(graded) == 6, "each once, as they came"
    assert set(threads) == {"whet-aside"}
    scores = [[each.score for group in one.groups for each in group.episodes] for one in (found, same)]
    assert scores[0] == scores[1] and [score.value for score in scores[0]] == [0, 1, 2, 3, 4, 5]
