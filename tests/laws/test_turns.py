"""Credit of turns: the worked numbers, what it is equal to, and that an episode weighs as one in however many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any

import numpy as np
import pytest
import torch

from tests.laws.support import gradients, largest_difference, tiny_trainer
from whet.algorithms.columns import trained_once, with_advantages, with_gains, with_rewards
from whet.algorithms.groups import Answer, to_answers
from whet.algorithms.policy import weigh
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.state import Setting
from whet.algorithms.turns import Gain
from whet.config import PolicyConfig, TrainConfig
from whet.formulas.step import REDUCTIONS, RunningScale, progress, turns_to_go
from whet.records import Completion, Ending, Episode, Group, Outcome, Score, TokenRow, Turn

CONFIGS: dict[str, dict[str, Any]] = {
    "turn_rloo": {"preset": "turn_rloo"},
    "turn_mean": {"credit": "turns", "baseline": "turn_mean", "turn_gamma": 0.9},
    "same_state": {"credit": "turns", "baseline": "same_state", "turn_weight": 0.5},
    "mt_grpo": {"preset": "mt_grpo"},
    "tree": {"preset": "spo_tree"},
    "tree_scaled": {"preset": "spo_tree", "scale": "group_std"},
    "grpo": {"baseline": "group_mean"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "batch": {"baseline": "batch_mean", "scale": "batch_std"},
    "whitened": {"baseline": "none", "scale": "token_std"},
    "opo": {"baseline": "length_weighted_mean", "scale": "none"},
}


def played(
    rewards: Sequence[float],
    *,
    outcome: float = 0.0,
    lengths: Sequence[int] = (),
    gap: int = 2,
    states: Sequence[str] = (),
    seed: int = 0,
) -> Episode:
    """An episode with these rewards of turns; `gap` tokens are observed between two turns."""
    drawn = np.random.default_rng(seed)
    prompt, turns = [1, 2, 3], []
    for number in range(len(rewards)):
        said = drawn.integers(5, 200, lengths[number] if lengths else 2).tolist()
        completion = Completion(tokens=said, logprobs=[-1.0] * len(said), version=0, ending=Ending.STOP)
        turns.append(Turn(prompt=prompt, completion=completion, state=states[number] if states else None))
        prompt = [*prompt, *said, *[7] * gap]
    score = Score(value=outcome + sum(rewards), turns=tuple(rewards))
    return Episode(
        task="t", sample=0, seed=0, messages=(), turns=tuple(turns), score=score, outcome=Outcome.FINISHED
    )  # fmt: skip


def answers(groups: Sequence[Sequence[Episode]], config: PolicyConfig) -> list[Answer]:
    made = [Group(task=str(number), episodes=tuple(episodes)) for number, episodes in enumerate(groups)]
    listed = to_answers(made, lambda score: score.value or 0.0)
    listed = with_rewards(listed, config, kl_coefficient=0.0, spread=RunningScale())
    return with_advantages(listed, config, weights={})


def by_turn(listed: Sequence[Answer]) -> list[list[float]]:
    """The advantage of each turn; all tokens of a turn have the same."""
    found = []
    for answer in listed:
        column = np.concatenate([row.columns["advantage"] for row in answer.rows])
        pieces = np.split(column, np.cumsum(answer.turn_lengths)[:-1])
        assert all((piece == piece[0]).all() for piece in pieces)
        found.append([float(piece[0]) for piece in pieces])
    return found


def advantages(rewards: Sequence[Sequence[float]], **axes: Any) -> list[list[float]]:
    config = PolicyConfig.model_validate({"credit": "turns", "scale": "none", **axes})
    return by_turn(answers([[played(each) for each in rewards]], config))


def near(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=5e-4)


WORKED = [[0.0, 1.0, 1.0], [0.0, 0.0], [1.0, 0.0, 0.0]]


def test_return_to_go_of_turns_by_hand() -> None:
    assert turns_to_go(torch.tensor([0.0, 1.0, 1.0]), gamma=1.0).tolist() == [2.0, 2.0, 1.0]
    assert turns_to_go(torch.tensor([1.0, 0.0, 2.0]), gamma=0.5).tolist() == [1.5, 1.0, 2.0]


def test_turn_rloo_and_turn_mean_by_hand() -> None:
    near(advantages(WORKED, baseline="turn_leave_one_out"), [[1.5, 2, 1], [-1.5, -1], [0, -1, -1]])
    near(advantages(WORKED, baseline="turn_mean"), [[1, 4 / 3, 0.5], [-1, -2 / 3], [0, -2 / 3, -0.5]])


def test_to_go_tells_stopping_from_going_on_where_an_index_does_not() -> None:
    """Stop after [.5] or go on to [.5, .5]: per index both would get 0, though going on pays."""
    near(advantages([[0.5], [0.5, 0.5]], baseline="turn_mean"), [[-0.25], [0.25, 0.0]])


def test_the_outcome_belongs_to_the_last_turn() -> None:
    config = PolicyConfig(credit="turns", baseline="none", scale="none")
    (answer,) = answers([[played([0.5, 0.25], outcome=1.0, lengths=[2, 1], gap=3)]], config)
    column = np.concatenate([row.columns["reward"] for row in answer.rows])
    assert column.tolist() == [0.0, 0.5, 1.25]
    assert by_turn([answer]) == [[1.75, 1.25]]


def test_turns_from_the_same_state_are_compared_by_hand() -> None:
    """Episodes a: s0 s1, b: s0 s1, c: s0 s2; outcomes 1, 0, 0. A_E is +-; s0 compares three, s1 two, s2 nobody."""
    episodes = [
        played([0, 0], outcome=1.0, states=["s0", "s1"]),
        played([0, 0], outcome=0.0, states=["s0", "s1"]),
        played([0, 0], outcome=0.0, states=["s0", "s2"]),
    ]
    axes = {"credit": "turns", "baseline": "same_state", "scale": "none", "turn_gamma": 0.5, "turn_weight": 2.0}
    found = by_turn(answers([episodes], PolicyConfig.model_validate(axes)))
    third = 1 / 3
    near(
        found, [[2 * third + 2 * third, 2 * third + 2 * 0.5], [-third - third, -third - 1.0], [-third - third, -third]]
    )
    # Equal returns are exactly 0, and a state that nobody else was in adds exactly 0.
    equal = [replace(each, score=Score(value=0.5)) for each in episodes]
    assert by_turn(answers([equal], PolicyConfig.model_validate({**axes, "scale": "group_std"}))) == [[0.0, 0.0]] * 3


def test_a_turn_s_own_reward_beside_the_outcome_by_hand() -> None:
    """MT-GRPO: outcomes 1, 0, 0, 1 and rewards of the first turn 1, 0, .5, .5, both by mean and std (Bessel)."""
    config = PolicyConfig.model_validate({"preset": "mt_grpo"})
    given = zip((1.0, 0.0, 0.5, 0.5), (1.0, 0.0, 0.0, 1.0), strict=True)
    found = by_turn(answers([[played([turn, 0.0], outcome=outcome) for turn, outcome in given]], config))
    near(found, [[2.0907, 0.866], [-2.0907, -0.866], [-0.866, -0.866], [0.866, 0.866]])
    half = PolicyConfig.model_validate({"preset": "mt_grpo", "turn_weight": 0.0})
    again = by_turn(answers([[played([1.0, 0.0], outcome=1.0), played([0.0, 0.0], outcome=0.0)]], half))
    near(again, [[0.7071, 0.7071], [-0.7071, -0.7071]])


def test_what_a_turn_changed_is_shared_with_those_before_it() -> None:
    scores = [0.2, 0.2, 0.6, 0.5]
    smeared = [0.2504761905, 0.1009523810, 0.2019047619, -0.0533333333]
    assert progress(scores, smear=0.5) == pytest.approx(smeared, abs=1e-10)
    assert progress(scores, smear=0.0) == pytest.approx([0.2, 0.0, 0.4, -0.1])
    third, fourth = 0.4 / 3, -0.1 / 4
    even = [0.2 + third + fourth, third + fourth, third + fourth, fourth]
    assert progress(scores, smear=1.0) == pytest.approx(even)
    assert progress([0.5, None, 0.25], smear=0.0) == [0.5, 0.0, -0.25]  # no score: as far as before
    assert progress([], smear=0.5) == []


# -------------------------------------------------------------------------------------------- branches


def branched(rewards: Sequence[float], *, ways: int = 2) -> list[Episode]:
    """Plays of two turns, `ways` of which share each first turn; the last turns are all different."""
    found = []
    for number, reward in enumerate(rewards):
        shared, own = played([0.0], lengths=[3], seed=100 + number // ways), played([0.0], lengths=[2], seed=number)
        (first,), (last,) = shared.turns, own.turns
        prompt = [*first.prompt.tolist(), *first.completion.tokens.tolist(), 7, 7]
        turns = (first, replace(last, prompt=np.array(prompt)))
        found.append(replace(own, turns=turns, sample=number, score=Score(value=reward)))
    return found


def test_a_turn_is_worth_what_the_plays_after_it_are_more_than_those_before() -> None:
    """Leaves (1, 1), (1, 0): the root is .75, the first turns +.25 and -.25, the last ones 0, 0 and .5, -.5."""
    config = PolicyConfig.model_validate({"preset": "spo_tree"})
    found = answers([branched([1.0, 1.0, 1.0, 0.0])], config)
    near(by_turn(found), [[0.25, 0.0], [0.25, 0.0], [-0.25, 0.5], [-0.25, -0.5]])
    # Plays that share nothing: each turn after the first adds nothing, and the first is the answer less the mean.
    alone = answers([[played([0, 0], outcome=o, seed=n) for n, o in enumerate((1.0, 0.0))]], config)
    near(by_turn(alone), [[0.5, 0.0], [-0.5, 0.0]])
    # The same first turn after another prompt is another one.
    near(by_turn(answers([branched([1.0, 1.0]), branched([0.0, 0.0])], config)), [[0.0, 0.0]] * 4)


def test_what_plays_share_is_trained_once() -> None:
    config = PolicyConfig.model_validate({"preset": "spo_tree"})
    found = answers([branched([1.0, 1.0, 1.0, 0.0])], config)
    trained = trained_once(found)
    assert [answer.length for answer in found] == [5, 5, 5, 5]
    assert [answer.length for answer in trained] == [5, 2, 5, 2]
    for before, after in zip(found, trained, strict=True):
        np.testing.assert_array_equal(before.rows[0].tokens, after.rows[0].tokens)
        kept = before.rows[0].columns["advantage"][-after.length :]
        np.testing.assert_array_equal(after.rows[0].columns["advantage"], kept)
    # Of the second play nothing is left that has an advantage: it counts, and is not computed.
    assert sum(row.trained_count for atom in weigh(found, setting_of(config)) for row in atom.rows) == 12


# ----------------------------------------------------------------------------------- information gain


def test_gain_is_what_a_turn_adds_to_the_probability_of_the_answer() -> None:
    gain = Gain(golds={}, weight=2.0, max_length=10)
    assert gain.rewards([0.02, 0.10, 0.10, 0.40]) == pytest.approx((0.16, 0.0, 0.60))
    assert gain.rewards([0.5, nan, 0.7]) == (0.0, 0.0)
    assert gain.rewards([0.3]) == ()


def test_gain_reads_the_answer_after_each_prompt_and_trains_none_of_it() -> None:
    trainer, gold = tiny_trainer(), (np.array([209]), np.array([210, 211]))
    episodes = [played([0.0, 0.0, 0.0], seed=1), played([0.0], seed=2)]
    gain = Gain(golds={"t": gold}, weight=1.0, max_length=1000)
    chances = gain.of(episodes, trainer)
    for episode, known in zip(episodes, chances, strict=True):
        for turn, chance in zip(episode.turns, known, strict=True):
            tokens = [*turn.prompt.tolist(), 209, 210, 211]
            row = TokenRow(tokens=tokens, trained=[False] * (len(tokens) - 2) + [True] * 2)
            assert chance == pytest.approx(float(np.exp(np.mean(trainer.forward([row], "logp")["logp"][0]))))
    assert chances[0][0] == chances[1][0]  # of one prompt
    config = PolicyConfig.model_validate({"credit": "turns", "baseline": "none", "scale": "none", "gain": {}})
    made = [Group(task="t", episodes=tuple(episodes))]
    listed, metrics = with_gains(to_answers(made, lambda score: score.value or 0.0), trainer, gain)
    first, second = with_rewards(listed, config, kl_coefficient=0.0, spread=RunningScale())
    start, then, end = chances[0]
    assert by_turn(with_advantages([first], config, weights={})) == [pytest.approx([end - start, end - then, 0.0])]
    assert by_turn(with_advantages([second], config, weights={})) == [[0.0]]
    assert metrics == {"gain/first": pytest.approx(start), "gain/last": pytest.approx((end + start) / 2)}
    assert all(210 not in row.tokens for answer in listed for row in answer.rows)
    short = Gain(golds={"t": gold}, weight=1.0, max_length=len(episodes[0].turns[1].prompt) + 3)
    assert [isnan(each) for each in short.of(episodes, trainer)[0]] == [False, False, True]


def test_without_a_state_a_turn_is_like_no_other() -> None:
    config = PolicyConfig.model_validate(CONFIGS["same_state"] | {"scale": "none"})
    episodes = [played([0.0, 1.0]), played([0.0, 0.0, 0.0])]
    near(by_turn(answers([episodes], config)), [[0.5, 0.5], [-0.5, -0.5, -0.5]])


def test_states_of_other_prompts_are_others() -> None:
    axes = {"credit": "turns", "baseline": "same_state", "scale": "none"}
    one = [played([0], outcome=float(n), states=["s"]) for n in range(2)]
    alone = by_turn(answers([one], PolicyConfig.model_validate(axes)))
    assert (
        by_turn(answers([one, [played([0], outcome=9.0, states=["s"])] * 2], PolicyConfig.model_validate(axes)))[:2]
        == alone
    )


# ------------------------------------------------------------------------------------------ equal to


@pytest.mark.parametrize(("turns", "whole"), [("turn_leave_one_out", "leave_one_out"), ("turn_mean", "group_mean")])
@pytest.mark.parametrize(
    ("scale", "length"), [("none", 1), ("none", 3), ("group_std", 1), ("group_std", 3), ("batch_std", 1)]
)
def test_with_one_turn_or_a_reward_at_the_end_it_is_the_usual(turns: str, whole: str, scale: str, length: int) -> None:
    """batch_std is over turns, so of three equal returns for each answer it has another Bessel factor: not here."""
    groups = [[played([0.0] * length, outcome=o, seed=n) for n, o in enumerate((1.0, 0.0, 0.5, 1.0))] for _ in range(2)]
    by_turns = answers(groups, PolicyConfig(credit="turns", baseline=turns, scale=scale))
    usual = answers(groups, PolicyConfig(baseline=whole, scale=scale))
    for left, right in zip(by_turns, usual, strict=True):
        np.testing.assert_allclose(left.rows[0].columns["advantage"], right.rows[0].columns["advantage"], atol=1e-12)


@pytest.mark.parametrize("name", ["turn_rloo", "turn_mean", "same_state"])
def test_the_order_of_episodes_and_the_length_of_observations_change_nothing(name: str) -> None:
    config = PolicyConfig.model_validate(CONFIGS[name])
    states = [["a", "b", "c"], ["a", "b"], ["a", "c", "b"]]
    episodes = [played(each, states=s, seed=n) for n, (each, s) in enumerate(zip(WORKED, states, strict=True))]
    found = by_turn(answers([episodes], config))
    near(by_turn(answers([episodes[::-1]], config))[::-1], found)
    longer = [played(each, states=s, seed=n, gap=9) for n, (each, s) in enumerate(zip(WORKED, states, strict=True))]
    assert by_turn(answers([longer], config)) == found


# ------------------------------------------------------------------------------------------ split law


def split(answer: Answer, cuts: Sequence[int]) -> Answer:
    """The answer in several rows: each has all tokens up to its last turn and trains the turns that are its own."""
    (row,) = answer.rows
    ends, rows, done = np.cumsum(answer.turn_lengths), [], 0
    places = np.flatnonzero(row.trained)
    for turn in [*cuts, len(ends)]:
        upto = int(ends[turn - 1])
        trained = np.zeros(len(row.tokens), np.bool_)
        trained[places[done:upto]] = True
        size = int(places[upto - 1]) + 1
        columns = {name: column[done:upto] for name, column in row.columns.items()}
        rows.append(
            TokenRow(
                tokens=row.tokens[:size], trained=trained[:size], columns=columns, shared=row.shared if not done else 0
            )
        )
        done = upto
    return replace(answer, rows=tuple(rows))


def sampled() -> list[list[Episode]]:
    states = ["a", "b", "a", "c"]
    one = [
        played(each, outcome=float(n == 0), lengths=[2, 3, 1, 2], states=states, seed=n)
        for n, each in enumerate(WORKED)
    ]
    return [
        one,
        [played([0.5, 0.0, 0.25, 0.0], lengths=[1, 1, 4, 2], states=states, seed=7), played([0.0], states=["a"])],
    ]


def setting_of(config: PolicyConfig) -> Setting:
    return Setting(
        config=config, train=TrainConfig(), steps=1, prompts_per_step=2, temperature=1, max_tokens=16, max_gap=1,
        weights={},
    )  # fmt: skip


def ready(listed: Sequence[Answer], config: PolicyConfig) -> list[Answer]:
    listed = with_rewards(listed, config, kl_coefficient=0.0, spread=RunningScale())
    return with_advantages(listed, config, weights={})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_episode_weighs_the_same_in_any_number_of_rows(name: str, reduction: str) -> None:
    config = PolicyConfig.model_validate({**CONFIGS[name], "reduction": reduction})
    setting = setting_of(config)
    made = [Group(task=str(number), episodes=tuple(group)) for number, group in enumerate(sampled())]
    whole = to_answers(made, lambda score: score.value or 0.0)
    cut = [split(answer, [1, 2] if len(answer.turn_lengths) > 2 else []) for answer in whole]
    assert sum(len(answer.rows) for answer in cut) > len(cut)
    found = []
    for listed in (whole, cut):
        trainer = tiny_trainer()
        atoms = weigh(ready(listed, config), setting)
        metrics = trainer.forward_backward(atoms, policy_loss(config))
        found.append((gradients(trainer), metrics["loss"].total))
    (left, loss), (right, other) = found
    scale = max(1.0, *(float(g.abs().max()) for g in left.values()))
    assert largest_difference(left, right) < 1e-12 * scale and abs(loss - other) < 1e-12 * scale
