"""Constraints: the multiplier by hand, what it takes off rewards, what is refused, and that a run goes on from it."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, nan

import pytest
import torch
from pydantic import ValidationError

from tests.laws.support import tiny_trainer
from tests.test_policy import FakeFeed, config, group, setting
from whet.algorithms.groups import to_answers
from whet.algorithms.policy import policy_gradient, prepare
from whet.algorithms.state import Charge, RunState
from whet.config import RLStage
from whet.config.rl import ConstraintConfig
from whet.formulas.policy import charged, controlled
from whet.records import Group, Score

LIMIT = ConstraintConfig(cost="cost", limit=0.25, proportional=2.0, integral=0.5, initial_multiplier=0.5)


def test_by_hand() -> None:
    assert charged(1.0, 0.5, multiplier=3.0) == -0.125
    assert controlled(0.5, 0.75, limit=0.25, gain=2.0, most=9.0) == 1.5
    assert controlled(0.5, 0.0, limit=0.25, gain=4.0, most=9.0) == 0.0
    assert controlled(0.5, 1e9, limit=0.25, gain=4.0, most=9.0) == 9.0


def costs(limit: ConstraintConfig, *, steps: int) -> list[float]:
    """Of a policy whose log-odds of the costly answer move by 0.3 (0.7 - multiplier): it gains 0.7, and may generalise.

    Under the integral alone one sum drives the other, like a pendulum.
    """
    charge = Charge(config=limit, integral=0.0, multiplier=0.0)
    x, found = 0.0, []
    for _ in range(steps):
        found.append(1 / (1 + exp(-x)))
        charge = charge.seeing({"rewards/cost": found[-1]}, still=False)
        x += 0.3 * (0.7 - charge.multiplier)
    return found


def test_the_proportional_part_is_what_makes_a_cost_rest_at_its_limit() -> None:
    limit = ConstraintConfig(cost="cost", limit=0.6, integral=0.5)
    swings, rests = (costs(limit.model_copy(update={"proportional": gain}), steps=80)[40:] for gain in (0.0, 5.0))
    assert max(swings) - min(swings) > 0.4
    assert all(abs(cost - 0.6) < 0.01 for cost in rests)


def test_what_a_cost_takes_off() -> None:
    charge = Charge(config=LIMIT, integral=0.0, multiplier=3.0)
    assert charge.reward(Score(value=1.0, parts={"cost": 0.5})) == -0.125
    assert charge.reward(Score(value=1.0, parts={"cost": None})) == 0.25, "it does not apply"
    assert charge.weights({"right": 2.0}) == {"right": 0.5, "cost": -0.75}


def test_a_step_is_charged_by_its_own_cost() -> None:
    first = Charge.start(LIMIT, {})
    assert first is not None and first.multiplier == 0.5
    second = first.seeing({"rewards/cost": 0.75}, still=False)
    assert (second.integral, second.multiplier) == (0.75, 0.75 + 1.0)
    third = second.seeing({"rewards/cost": 0.0}, still=False)
    assert (third.integral, third.multiplier) == (0.625, 0.625 - 0.5)


def test_nothing_is_added_up_where_nothing_was_measured_or_can_be_learnt() -> None:
    charge = Charge(config=LIMIT, integral=0.5, multiplier=1.0)
    for metrics in ({"rewards/cost": nan}, {}):
        unknown = charge.seeing(metrics, still=False)
        assert (unknown.integral, unknown.multiplier) == (0.5, 0.5)
    still = charge.seeing({"rewards/cost": 0.5}, still=True)
    assert (still.integral, still.multiplier) == (0.5, 0.5 + 0.5)


def test_a_run_charges_and_goes_on_from_a_steps_state() -> None:
    """The right answers cost 1, so the mean cost is 1/2, 1/4 above the limit."""
    trainer = tiny_trainer(dtype=torch.float32)
    chosen = replace(setting(config(preset="lite_ppo")), constraint=LIMIT)
    first, second = policy_gradient(trainer, FakeFeed(trainer, costly), chosen)  # type: ignore[arg-type]
    assert first.metrics["constraint/multiplier"] == 0.5 + 0.125 + 0.5
    assert second.metrics["constraint/multiplier"] == 0.5 + 0.25 + 0.5
    gone_on = RunState.start(chosen, first.state).seeing(second.metrics, still=False)
    assert gone_on.charge is not None
    assert gone_on.charge.multiplier == second.metrics["constraint/multiplier"]
    assert gone_on.reward(Score(value=1.0, parts={"cost": 1.0})) < 0.0


def test_where_rewards_are_normalised_one_by_one_the_cost_is_one_of_them() -> None:
    """Right answers cost what they are worth: at a multiplier of 1 nothing is left, at 3 wrong ones are better."""
    chosen, trainer = replace(setting(config(preset="gdpo")), constraint=LIMIT), tiny_trainer(dtype=torch.float32)

    def advantages(multiplier: float) -> list[float]:
        charge = Charge(config=LIMIT, integral=0.0, multiplier=multiplier)
        standing = replace(RunState.start(chosen, {}), charge=charge)
        given = prepare(trainer, None, to_answers(costly(), standing.reward), chosen, standing, step=0).answers
        return [answer.rows[0].columns["advantage"][-1] for answer in given]

    free = advantages(0.0)
    assert [a > 0.5 for a in free] == [True, False, False, True] and min(free) < -0.5
    assert advantages(1.0) == pytest.approx([0] * 4, abs=1e-4)
    assert advantages(3.0) == pytest.approx([-a for a in free], rel=1e-2)


def costly() -> tuple[Group, ...]:
    made = []
    for each in (group(1, 0), group(0, 1)):
        episodes = tuple(
            replace(e, score=replace(e.score, parts={"reward": e.score.value, "cost": e.score.value}))
            for e in each.episodes
        )
        made.append(replace(each, episodes=episodes))
    return tuple(made)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"constraint": {"cost": "tokens", "limit": 1}}, "none of the rewards: verifier, length"),
        ({"constraint": {"cost": "verifier", "limit": 1}}, "give it weight: 0"),
        ({"constraint": {"cost": "length", "limit": 1, "initial_multiplier": 200}}, "above max_multiplier"),
        ({"constraint": {"cost": "length", "limit": 1, "proportional": 0, "integral": 0}}, "never moves"),
        ({"constraint": {"cost": "length", "limit": inf, "max_multiplier": nan}}, "greater than 0|finite"),
        ({"algorithm": "dr_grpo", "rollouts_per_prompt": 1}, "a group of one"),
        ({"algorithm": "grpo"}, "whatever the multiplier"),
        ({"algorithm": {"preset": "dapo", "scale": "none"}}, "dynamic_sampling: null"),
    ],
)
def test_what_means_nothing_is_refused(stage: dict[str, object], reason: str) -> None:
    base: dict[str, object] = {
        "kind": "rl",
        "tasks": {"generate": "arithmetic"},
        "rewards": [{"kind": "verifier"}, {"kind": "length", "above_tokens": 20, "weight": 0}],
        "algorithm": "lite_ppo",
        "constraint": {"cost": "length", "limit": 0.1},
        "train": {"steps": 1},
    }
    RLStage.model_validate(base)
    RLStage.model_validate(base | {"algorithm": "gdpo"})
    with pytest.raises(ValidationError, match=reason):
        RLStage.model_validate(base | stage)
