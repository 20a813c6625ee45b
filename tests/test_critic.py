"""The critic as a provider of columns, and as something that learns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.laws.support import values_of
from whet.algorithms.critic import Critic, Trajectory, turns, weigh
from whet.config import CreateConfig, GeneratedConfig, ModelConfig, TrainConfig
from whet.config.policy_terms import CriticConfig
from whet.envs.families import family
from whet.formulas.step import RunningScale
from whet.models.create import byte_tokenizer
from whet.models.load import load_scalar_model
from whet.records import Atom, TokenRow
from whet.training.engine import LocalTrainer

PLAIN = CriticConfig(lam_policy=1.0, lam_value=1.0)


class Scripted:
    """A trainer whose value of a state is the token that is chosen there, over ten."""

    def forward(self, rows: Sequence[TokenRow], want: str) -> dict[str, list[np.ndarray]]:
        return {want: [row.tokens[row.trained] / 10 for row in rows]}


def critic(**setting: Any) -> Critic:
    return Critic(trainer=Scripted(), config=PLAIN.model_copy(update=setting))  # type: ignore[arg-type]


def row(tokens: Sequence[int], trained: str, **columns: Sequence[float]) -> TokenRow:
    """`trained`: one character a token, `x` for the trained ones."""
    given = {name: tuple(values) for name, values in columns.items()}
    return TokenRow(tokens=tuple(tokens), trained=tuple(c == "x" for c in trained), columns=given)


def give_rewards(trajectory: Trajectory, score: float) -> Trajectory:
    """The score at the last trained token, as the policy's columns have it without a KL."""
    counts = [r.trained_count for r in trajectory.rows]
    numbers = iter([0.0] * (sum(counts) - 1) + [score])
    rows = tuple(
        r.with_columns(reward=tuple(next(numbers) for _ in range(count)))
        for r, count in zip(trajectory.rows, counts, strict=True)
    )
    return replace(trajectory, rows=rows)


def column(trajectory: Trajectory, name: str) -> list[float]:
    return [x for row in trajectory.rows for x in row.columns[name]]


# ------------------------------------------------------------------------------------------------ provide


def test_the_columns_by_hand() -> None:
    rewarded = give_rewards(Trajectory(rows=(row([1, 5, 6, 7], ".xxx"),)), 1.0)
    assert column(rewarded, "reward") == [0, 0, 1]
    (judged,) = critic(lam_policy=0.95).provide([rewarded]).trajectories
    assert column(judged, "value") == [0.5, 0.6, 0.7]
    assert column(judged, "advantage") == pytest.approx([0.46575, 0.385, 0.3])
    assert column(judged, "return") == [1, 1, 1]


def test_observations_are_not_in_the_chain() -> None:
    """Whatever a tool wrote between the turns, columns are those of the same actions without it."""
    without = give_rewards(Trajectory(rows=(row([1, 5, 6, 7, 3], ".xxxx"),)), 1.0)
    with_observation = give_rewards(Trajectory(rows=(row([1, 5, 6, 8, 9, 9, 7, 3], ".xx...xx"),)), 1.0)
    rewritten = give_rewards(Trajectory(rows=(row([1, 5, 6], ".xx"), row([9, 8, 7, 3], "..xx"))), 1.0)
    setting = {"lam_policy": 0.9, "lam_value": 0.8, "gamma": 0.99}
    plain, observed, split = critic(**setting).provide([without, with_observation, rewritten]).trajectories
    for name in ("value", "advantage", "return"):
        assert column(observed, name) == pytest.approx(column(plain, name))
        assert column(split, name) == pytest.approx(column(plain, name))


def test_lambdas_of_the_policy_and_of_the_values_are_apart() -> None:
    rewarded = [give_rewards(Trajectory(rows=(row([1, 5, 6, 7], ".xxx"),)), 1.0)]
    (judged,) = critic(lam_policy=0.0).provide(rewarded).trajectories
    assert column(judged, "advantage") == pytest.approx([0.1, 0.1, 0.3])
    assert column(judged, "return") == [1, 1, 1]
    # 3 tokens are fewer than 1 / 0.05: VAPO's lambda is held at 0; with alpha 0.5 it is 1 - 1 / 1.5.
    (judged,) = critic(length_alpha=0.05).provide(rewarded).trajectories
    assert column(judged, "advantage") == pytest.approx([0.1, 0.1, 0.3])
    (judged,) = critic(length_alpha=0.5).provide(rewarded).trajectories
    assert column(judged, "advantage") == pytest.approx([0.1 + (0.1 + 0.3 / 3) / 3, 0.1 + 0.3 / 3, 0.3])


def test_an_answer_that_was_cut_may_go_on_by_its_last_state() -> None:
    cut = give_rewards(Trajectory(rows=(row([1, 5, 6], ".xx"),), truncated=True), 0.0)
    over = give_rewards(Trajectory(rows=(row([1, 5, 6], ".xx"),)), 0.0)
    for trajectory in critic().provide([cut, over]).trajectories:
        assert column(trajectory, "return") == [0, 0]
    first, second = critic(bootstrap_truncated=True).provide([cut, over]).trajectories
    assert column(first, "return") == pytest.approx([0.6, 0.6])  # the scripted value after the last token, a 6
    assert column(second, "return") == [0, 0]


def test_turns_are_runs_of_sampled_tokens() -> None:
    rows = [row([1, 2, 3, 4, 5, 6], ".xx.xx"), row([1, 2, 3], "..x")]
    assert turns(rows) == (0, 0, 1, 1, 2)
    trajectory = Trajectory(rows=(row([1, 2, 9, 0, 6, 9], ".xx.xx", reward=[0, 0.5, 0, 1]),))
    (judged,) = critic(level="turn", gamma=0.9, lam_policy=0.5, lam_value=1.0).provide([trajectory]).trajectories
    # Turn values 0.2 and 0.6, rewards 0.5 and 1: see test_value.test_turns_are_actions.
    assert column(judged, "advantage") == pytest.approx([0.84 + 0.45 * 0.4] * 2 + [0.4] * 2)
    assert column(judged, "return") == pytest.approx([0.5 + 0.9] * 2 + [1.0] * 2)
    (weighed,) = weigh([Atom(rows=judged.rows)], level="turn")
    assert weighed.rows[0].columns["weight"].tolist() == [0.5, 0, 0.5, 0]
    (weighed,) = weigh([Atom(rows=judged.rows)], level="token")
    assert weighed.rows[0].columns["weight"].tolist() == [0.25] * 4


# ------------------------------------------------------------------------------------------------ state


def test_the_running_scale_is_that_of_everything_seen() -> None:
    draw = random.Random(0)
    batches = [[draw.gauss(3, 2) for _ in range(size)] for size in (1, 7, 0, 30)]
    scale = RunningScale()
    for batch in batches:
        scale = RunningScale.start(scale.merge(batch).saved)
    everything = torch.tensor([score for batch in batches for score in batch], dtype=torch.float64)
    std = float(everything.std(correction=0))
    assert scale.scaled(5.0) == pytest.approx(5.0 / std)
    assert RunningScale().merge([2.0, 2.0]).scaled(2.0) == 2.0


# ------------------------------------------------------------------------------------------------ learning


def small_critic() -> Critic:
    create = CreateConfig(hidden_size=32, layers=2, heads=2, kv_heads=2, intermediate_size=64, max_length=64)
    model = load_scalar_model(ModelConfig(path="whet:tiny", create=create))
    return Critic(trainer=LocalTrainer(model, TrainConfig(lr=3e-3)), config=CriticConfig(epochs=2, minibatches=2))


def rollouts(step: int) -> list[Trajectory]:
    """16 sums, answered rightly by half of the rollouts; the others give up, which is worth nothing."""
    tokenizer = byte_tokenizer()
    tasks = family(GeneratedConfig(generate="arithmetic", digits=1))
    found = []
    for number in range(16 * step, 16 * step + 16):
        task = tasks.task(number)
        prompt = tokenizer.encode(task.messages[0].content + "=")
        for right in (True, False):
            answer = [*tokenizer.encode(task.columns["answer"] if right else "??"), tokenizer.eos_token_id]
            flags = (False,) * len(prompt) + (True,) * len(answer)
            written = TokenRow(tokens=(*prompt, *answer), trained=flags, shared=len(prompt))
            found.append(give_rewards(Trajectory(rows=(written,)), float(right)))
    return found


def test_values_come_to_explain_the_returns() -> None:
    """Before the first token nobody can tell (value 1/2), after it everybody can.

    Answers have 2 or 3 tokens, so of every 5 or 6 states 2 are first ones, whose returns vary as those of all do:
    between 0.60 and 0.67 can be explained.
    """
    torch.manual_seed(0)
    learner = small_critic()
    measured = []
    for step in range(25):
        provided = replace(learner, config=learner.config.monte_carlo).provide(rollouts(step))
        rows = [r for trajectory in provided.trajectories for r in trajectory.rows]
        measured.append({**provided.metrics, **learner.update(rows, lr_factor=1.0, seed=step)})
    explained = [m["value/explained_variance"] for m in measured]
    assert explained[0] == 0  # a new head says 0 everywhere
    assert explained[-1] > 0.5
    assert measured[-1]["value/loss"] < measured[0]["value/loss"] / 2
    first = [values[0] for values in values_of(learner.trainer, [t.rows[0] for t in rollouts(30)])]
    assert sum(first) / len(first) == pytest.approx(0.5, abs=0.15)
