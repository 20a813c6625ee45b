"""The health monitor on sequences of metrics: what it names, when, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.laws.support import tiny_trainer
from tests.test_policy import FakeFeed, _two_groups, config, setting
from whet.algorithms.policy import policy_gradient
from whet.algorithms.state import FINDERS, Health
from whet.config.rl import HealthConfig
from whet.errors import TrainingError
from whet.records import Step

HEALTHY = {
    "solved": 0.5, "reward": 0.5, "entropy": 0.4, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.3,
    "kl": 0.01, "clip_ratio/low_mean": 0.01, "clip_ratio/high_mean": 0.02, "sampling/logp_gap_mean": 1e-6,
    "grad_norm": 1.0,
}  # fmt: skip


def watch(steps: Sequence[dict[str, float]], **options: object) -> list[list[str]]:
    """The names of the findings after each step."""
    health, found = Health(config=HealthConfig.model_validate(options)), []
    for metrics in steps:
        health = health.after({**HEALTHY, **metrics})
        found.append([finding.name for finding in health.findings])
    return found


def test_a_run_that_learns_is_left_alone() -> None:
    steps = [
        {"solved": 0.2 + 0.02 * i, "entropy": 0.4 * 0.95**i, "completions/mean_length": 14.0 + i} for i in range(40)
    ]
    assert watch(steps) == [[]] * 40


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("collapse", {"solved": 0.0}),
        ("entropy_loss", {"entropy": 0.001}),
        ("length_runaway", {"completions/clipped_ratio": 0.9}),
        ("no_signal", {"frac_reward_zero_std": 1.0}),
        ("far_from_reference", {"kl": 3.0}),
        ("clipping", {"clip_ratio/high_mean": 0.6}),
        ("gap", {"sampling/logp_gap_mean": 0.2}),
        ("gradient", {"grad_norm": 100.0}),
    ],
)
def test_each_illness_is_named_once_it_shows_and_again_every_window(name: str, metrics: dict[str, float]) -> None:
    found = watch([{}] * 10 + [metrics] * 30)
    assert found[:10] == [[]] * 10
    named = [i for i, names in enumerate(found) if names]
    assert {each for names in found for each in names} == {name}
    assert named[0] < 30
    if name != "gradient":  # a jump is one event, not a state
        assert [b - a for a, b in pairwise(named)] == [5] * (len(named) - 1)
    assert watch([{}] * 10 + [metrics] * 30, **{name: "ignore"}) == [[]] * 40
    assert name in FINDERS


def test_the_collapse_of_a_weak_base_is_caught_while_something_is_left() -> None:
    """A quarter solved and all of it lost in twenty steps, as a rate that was too high once did."""
    falling = [{"solved": max(0.0, 0.25 - 0.0125 * i)} for i in range(25)]
    caught = next(i for i, names in enumerate(watch(falling)) if "collapse" in names)
    assert falling[caught]["solved"] > 0.05


def test_lowering_lowers_once_a_window_and_is_remembered() -> None:
    options = {"collapse": "lower", "lower_by": 0.5}
    health = Health(config=HealthConfig.model_validate(options))
    rates = []
    for i in range(30):
        health = health.after({**HEALTHY, "solved": 0.5 if i < 10 else 0.0})
        rates.append(health.rate)
    assert rates[9] == 1 and set(rates) == {1, 0.5, 0.25, 0.125, 0.0625}
    again = Health(config=health.config, state=dict(health.state))
    assert again.after(HEALTHY) == health.after(HEALTHY)


def test_stopping_comes_after_the_step_and_says_what_was_found() -> None:
    trainer = tiny_trainer()
    ill = HealthConfig(window=1, clipping="ignore", entropy_loss="ignore", gradient="stop", gradient_above=1.0001)
    chosen = replace(setting(config(), steps=9), health=ill)
    steps: list[Step] = []
    with pytest.raises(TrainingError, match=r"step \d: gradient: the gradient's norm is"):
        steps.extend(policy_gradient(trainer, FakeFeed(trainer, _two_groups), chosen))  # type: ignore[arg-type]
    assert steps[-1].notes[0].startswith("gradient: ")
    assert steps[-1].state["health/rate"] == 1


def test_watching_no_reward_that_judges_falls_back_to_the_reward() -> None:
    without = {key: value for key, value in HEALTHY.items() if key != "solved"} | {"solved": float("nan")}
    health = Health(config=HealthConfig())
    names = []
    for i in range(30):
        health = health.after({**without, "reward": 1.0 if i < 10 else 0.0})
        names += [finding.name for finding in health.findings]
    assert set(names) == {"collapse"}
