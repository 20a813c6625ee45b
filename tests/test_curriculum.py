"""Curricula: buckets of difficulty, rests, past prompts again, and a feed that goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.test_rollouts import SingleTurn, feed, names, player, task
from whet.config import CurriculumConfig, RLStage
from whet.errors import DataError, RewardError
from whet.records import Episode, Group, Outcome, Score
from whet.rollouts.curriculum import Curriculum, hardness_of
from whet.rollouts.feed import Feed
from whet.sampling.base import Request


def curriculum(hardness: list[float] | None = None, **keys: Any) -> Curriculum:
    return Curriculum(config=CurriculumConfig.model_validate(keys), tasks=7, hardness=hardness or [])


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A step's state with its arrays as text, which says NaN where `==` would not."""
    return {name: str(value) for name, value in state.items()}


def result(*right: bool | None) -> Group:
    episodes = (
        Episode(
            task="t",
            sample=i,
            seed=0,
            messages=(),
            turns=(),
            score=Score(value=float(correct or 0), correct=correct),
            outcome=Outcome.FINISHED,
        )
        for i, correct in enumerate(right)
    )
    return Group(task="t", episodes=tuple(episodes))


def test_pools_come_easiest_first_and_keep_the_shuffle_inside() -> None:
    made = curriculum([3, 1, 2, 9, 5, 4], order_by="digits", buckets=3)
    assert made.order([5, 4, 3, 2, 1, 0]) == [2, 1, 5, 0, 4, 3]  # hardness 1, 2 | 3, 4 | 5, 9


def test_measured_difficulty_orders_the_next_epoch_only() -> None:
    made = curriculum(order_by="solved", buckets=2)
    made.observe(0, result(True, False, False, False), step=0)
    made.observe(3, result(True, True, True, False), step=0)
    assert made.order([0, 1, 2, 3]) == [0, 1, 2, 3]  # nothing was known when this epoch began
    made.begin_epoch()
    assert made.order([0, 1, 2, 3]) == [1, 3, 0, 2]  # 3/4, and of two unknown ones the first


def test_what_is_solved_or_hopeless_rests_for_a_while() -> None:
    made = curriculum(skip_above=1.0, skip_below=0.0, skip_steps=2)
    for number, group in enumerate([result(True, True), result(False, False), result(True, False), result(None)]):
        made.observe(number, group, step=4)
    assert [[made.rests(number, step) for number in range(4)] for step in (5, 6, 7)] == [
        [True, True, False, False], [True, True, False, False], [False] * 4,
    ]  # fmt: skip
    assert [made.resting(step) for step in (5, 6, 7)] == [2, 2, 0]
    made.observe(2, result(True, None), step=5)
    assert made.rate[2] == 1.0, "of what was judged"
    made.observe(0, result(True, False), step=5)
    assert not made.rests(0, 6)


def test_past_prompts_come_again_only_while_they_teach() -> None:
    made = curriculum(replay=0.5)
    for number, group in enumerate(
        [result(True, True), result(True, False), result(False, False), result(False, True)]
    ):
        made.observe(number, group, step=0)
    assert sorted(made.again(8, step=1, seed=0)) == [1, 3]  # four are wanted, two are there
    assert len(made.again(2, step=1, seed=0)) == 1
    assert {made.again(2, step=step, seed=0)[0] for step in range(20)} == {1, 3}
    made = curriculum(replay=0.9, skip_above=0.5, skip_steps=2)
    made.observe(0, result(True, False), step=0)
    made.observe(1, result(True, False, False), step=0)
    assert [sorted(made.again(2, step=step, seed=0)) for step in (2, 3)] == [[1], [0, 1]], "the first one rests"


def learner(keys: Mapping[str, Any], state: Mapping[str, float] | None = None) -> Feed:
    """Two of three answers are right, by their seeds."""

    def script(request: Request) -> str:
        return "right" if request.seed % 3 else "wrong"

    made = feed(script, tasks=7)
    made.curriculum = curriculum([1, 2, 3, 4, 5, 6, 7], **keys)
    if state is not None:
        made.restore(state)
    return made


@pytest.mark.parametrize(
    "keys",
    [
        {"order_by": "digits", "buckets": 2, "replay": 0.4},
        {"order_by": "solved", "buckets": 3, "skip_above": 0.9, "skip_steps": 1},
        {"skip_below": 0.4, "skip_above": 0.6, "skip_steps": 3, "replay": 0.3},
    ],
)
def test_a_feed_restored_from_a_steps_state_goes_on_as_if_it_had_never_stopped(keys: Mapping[str, Any]) -> None:
    whole = learner(keys)
    for step in range(9):
        resumed = learner(keys, whole.state)
        taken = whole.take(3, step=step)
        assert resumed.take(3, step=step) == replace(
            taken, rollout_s=pytest.approx(0, abs=9), score_s=pytest.approx(0, abs=9)
        )
        assert plain(resumed.state) == plain(whole.state)
    assert whole.curriculum is not None and np.isfinite(whole.curriculum.rate).sum() > 3
    early = learner(keys)
    early.take(3, step=0)
    whole.restore(early.state)  # a run that goes back: of what came later nothing is known any more
    assert plain(whole.state) == plain(early.state)


def test_a_feed_passes_over_what_rests_and_wakes_one_where_all_do() -> None:
    source = feed("right", tasks=3)
    source.curriculum = curriculum(skip_above=1.0, skip_steps=5)
    first = names(source.take(2, step=0).groups)
    taken = source.take(2, step=1)
    assert taken.resting == 2
    assert names(taken.groups)[0] not in first  # the third task, then one of those that rest
    assert len(taken.groups) == 2


def test_takes_without_a_score_are_counted_across_a_stop() -> None:
    class Silent:
        def score(self, attempts: Any, *, step: int) -> list[Score]:
            return [Score(value=None, outcome=Outcome.GRADER_ERROR, note="down")] * len(attempts)

        def close(self) -> None:
            pass

    def silent() -> Feed:
        made = feed()
        made.player = player(environment=SingleTurn, rubric=Silent())
        return made

    source = silent()
    source.take(1, step=0)
    source.take(1, step=1)
    resumed = silent()
    resumed.restore(source.state)
    with pytest.raises(RewardError, match="last 3 steps"):
        resumed.take(1, step=2)


def test_a_column_must_hold_numbers() -> None:
    config = CurriculumConfig(order_by="level")
    listed = [replace(task("a"), columns={"level": 2}), replace(task("b"), columns={"level": "hard"})]
    with pytest.raises(DataError, match=r"task b: curriculum\.order_by is 'level', and the row has no number there"):
        hardness_of(listed, config)
    with pytest.raises(DataError, match="no number there"):
        hardness_of([replace(task("c"), columns={"level": True})], config)
    assert hardness_of(listed[:1], config) == [2.0] and hardness_of(listed, CurriculumConfig(order_by="solved")) == []


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, "changes nothing"),
        ({"skip_below": 0.5, "skip_above": 0.5}, "skip every task"),
        ({"order_by": "solved"}, "no reward judges that"),
        ({"replay": 0.5}, "no reward judges that"),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], why: str) -> None:
    base = {"kind": "rl", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "format"}], "train": {"steps": 1}}
    with pytest.raises(ValueError, match=why):
        RLStage.model_validate({**base, "curriculum": keys})
    RLStage.model_validate({**base, "curriculum": {"order_by": "difficulty"}})
