"""Constraints: the multiplier by hand, what it takes off rewards, what is refused, and that a run goes on from it."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, nan, sqrt

import pytest
import torch
from pydantic import ValidationError

from tests.laws.support import tiny_trainer
from tests.test_policy import FakeFeed, config, group, setting
from whet.algorithms.policy import policy_gradient
from whet.algorithms.standing import Charge, Standing
from whet.config import RLStage
from whet.config.constraint import ConstraintConfig
from whet.formulas.constraint import charged, next_multiplier
from whet.records import Group, Score

LIMIT = ConstraintConfig(cost="cost", limit=0.25, rate=2.0, start=0.5)


def test_by_hand() -> None:
    assert charged(1.0, 0.5, multiplier=3.0) == -0.125
    assert next_multiplier(0.5, 0.75, limit=0.25, rate=2.0, most=9.0) == 0.5 * exp(0.5)
    assert next_multiplier(0.5, 0.0, limit=0.25, rate=2.0, most=9.0) == 0.5 * exp(-0.25)
    assert next_multiplier(8.0, 1e9, limit=0.25, rate=2.0, most=9.0) == 9.0


def test_the_cost_ends_at_its_limit_while_the_reward_grows() -> None:
    """Reward sqrt(x), cost x, at most 1/4: where the multiplier is the reward's slope there, 1."""
    x, multiplier = 0.01, 0.5
    for _ in range(4000):
        x += 0.02 * (0.5 / sqrt(x) - multiplier) / (1 + multiplier)
        multiplier = next_multiplier(multiplier, x, limit=0.25, rate=0.1, most=100.0)
    assert (x, multiplier) == (pytest.approx(0.25, abs=1e-3), pytest.approx(1.0, abs=1e-2))


def test_what_a_cost_takes_off() -> None:
    charge = Charge(config=LIMIT, multiplier=3.0)
    assert charge.reward(Score(value=1.0, parts={"cost": 0.5})) == -0.125
    assert charge.reward(Score(value=1.0, parts={"cost": None})) == 0.25, "it does not apply"
    assert charge.weights({"right": 2.0}) == {"right": 0.5, "cost": -0.75}


def test_the_multiplier_stands_still_where_nothing_was_measured_or_learnt() -> None:
    charge = Charge(config=LIMIT, multiplier=0.5)
    for metrics in ({"rewards/cost": nan, "optimizer_steps": 1.0}, {"rewards/cost": 1.0, "optimizer_steps": 0.0}):
        assert charge.after(metrics) == charge
    assert charge.after({"optimizer_steps": 1.0}) == charge


def test_a_run_charges_and_goes_on_from_a_steps_state() -> None:
    """The right answers cost 1, so the mean cost is 1/2, 1/4 above the limit."""
    trainer = tiny_trainer(dtype=torch.float32)
    chosen = replace(setting(config(preset="lite_ppo")), constraint=LIMIT)
    first, second = policy_gradient(trainer, FakeFeed(trainer, costly), chosen)  # type: ignore[arg-type]
    assert first.metrics["constraint/multiplier"] == 0.5
    assert second.metrics["constraint/multiplier"] == pytest.approx(0.5 * exp(0.25))
    gone_on = Standing.start(chosen, first.state)
    assert gone_on.charge is not None
    assert gone_on.charge.multiplier == second.metrics["constraint/multiplier"]
    assert gone_on.reward(Score(value=1.0, parts={"cost": 1.0})) < 0.5


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
        ({"constraint": {"cost": "length", "limit": 1, "start": 200}}, "above most"),
        ({"constraint": {"cost": "length", "limit": inf, "most": nan}}, "greater than 0|finite"),
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
