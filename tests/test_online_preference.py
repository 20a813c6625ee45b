"""Online preferences: which answers are paired, what is counted, and a reference that stays or follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.laws.support import tiny_trainer
from tests.test_policy import FakeFeed
from whet.algorithms.online_preference import BARREN, online_preference, ranked
from whet.config import OnlinePreferenceStage
from whet.config.loading import load_recipe
from whet.errors import ConfigError, TrainingError
from whet.launch.main import run_recipe
from whet.records import Completion, Ending, Episode, Group, Outcome, Score, Step, Turn
from whet.tracking.log import read_metrics
from whet.training.base import OptimResult
from whet.training.engine import LocalTrainer

MODEL = {
    "path": "whet:tiny",
    "create": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16},
}


def group(*rewards: float | None) -> Group:
    """Answers whose first token is their number."""
    return Group(task="t", episodes=tuple(episode(i, reward) for i, reward in enumerate(rewards)))


def episode(number: int, reward: float | None) -> Episode:
    completion = Completion(tokens=(number, 9), logprobs=(-1.0, -1.0), version=0, ending=Ending.STOP)
    return Episode(
        task="t",
        sample=number,
        seed=0,
        messages=(),
        turns=(Turn(prompt=(7, 8), completion=completion),),
        score=Score(value=reward),
        outcome=Outcome.FINISHED if reward is not None else Outcome.GRADER_ERROR,
    )


def order(found: Any) -> list[int] | None:
    return None if found is None else [row.tokens[2] for row in found.rows]


@pytest.mark.parametrize(
    ("rewards", "extremes", "every"),
    [
        ((0.5, 1.0, 0.0), [1, 2], [1, 0, 2]),
        ((1.0, 1.0, 0.0, 0.0), [0, 2], [0, 2]),
        ((1.0, 1.0), None, None),
        ((None, 0.5, 0.2), [1, 2], [1, 2]),
        ((None, 0.5), None, None),
        ((None, None), None, None),
    ],
)
def test_the_best_and_the_worst_are_a_pair_and_ties_are_none(
    rewards: tuple[float | None, ...], extremes: list[int] | None, every: list[int] | None
) -> None:
    assert order(ranked(group(*rewards), all_pairs=False)) == extremes
    assert order(ranked(group(*rewards), all_pairs=True)) == every
    found = ranked(group(1.0, 0.0), all_pairs=False)
    assert found is not None and all(row.shared == 2 and row.trained_count == 2 for row in found.rows)


def stage(folder: Path, **changed: Any) -> Path:
    config = {
        "kind": "online_preference",
        "tasks": {"generate": "arithmetic", "count": 24, "digits": 1},
        "rewards": [{"kind": "repetition", "ngram": 1}],
        "prompts_per_step": 4,
        "rollouts_per_prompt": 4,
        "sampling": {"max_tokens": 12},
        **changed,
        "train": {"steps": 3, "lr": 0.01, **changed.get("train", {})},
    }
    recipe = {"name": "o", "model": MODEL, "out": str(folder / "run"), "stages": {"o": config}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("renew", [None, 1])
def test_against_the_iterate_before_every_step_begins_at_log_two(tmp_path: Path, renew: int | None) -> None:
    run_recipe(load_recipe(stage(tmp_path, update_reference_every=renew)), quiet=True)
    lines = read_metrics(tmp_path / "run" / "stages" / "01-o")
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    at_start = [loss == pytest.approx(math.log(2), abs=1e-6) for loss in losses]
    assert at_start == ([True, True, True] if renew else [True, False, False])
    for line in lines:
        assert line["pairs/prompts"] + line["pairs/tied"] + line["pairs/unscored"] == 4  # type: ignore[operator]


def test_pairs_of_a_step_are_split_into_minibatches_and_each_is_an_update(tmp_path: Path) -> None:
    run_recipe(load_recipe(stage(tmp_path, minibatches=3)), quiet=True)
    lines = read_metrics(tmp_path / "run" / "stages" / "01-o")
    # Four pairs are two updates of two, and three are three of one.
    updates = {line["pairs/prompts"]: line["optimizer_steps"] for line in lines}
    assert updates and updates.items() <= {1: 1, 2: 2, 3: 3, 4: 2}.items()


def online(made: Callable[[], tuple[Group, ...]], **resumed: Any) -> Iterator[Step]:
    """Steps on these groups, one update each."""
    trainer = tiny_trainer(dtype=torch.float32)
    feed: Any = FakeFeed(trainer, made)
    config = OnlinePreferenceStage.model_validate({
        "kind": "online_preference", "tasks": {"generate": "arithmetic"}, "loss": "simpo", "prompts_per_step": 1,
        "train": {"steps": 99, "lr": 1e-5},
    })  # fmt: skip
    return online_preference(trainer, feed, config, steps=99, max_gap=1e-3, **resumed)


def test_twenty_steps_without_a_pair_end_the_run_stopped_in_between_or_not() -> None:
    def equal() -> tuple[Group, ...]:
        return group(0.5, 0.5, None), group(None, 1.0)

    *_, last = islice(online(equal), BARREN - 1)
    assert (last.metrics["pairs/tied"], last.metrics["pairs/unscored"], last.metrics["optimizer_steps"]) == (1, 1, 0)
    with pytest.raises(TrainingError, match=f"no prompt had two answers of different reward in {BARREN} steps"):
        next(online(equal, start=BARREN - 1, state=last.state))


def test_three_updates_in_a_row_that_are_not_finite_end_the_run_stopped_in_between_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def different() -> tuple[Group, ...]:
        return (group(1.0, 0.0),)

    lost = OptimResult(applied=False, grad_norm=math.inf)
    monkeypatch.setattr(LocalTrainer, "optim_step", lambda *_, **__: lost)
    *_, last = islice(online(different), 2)
    assert (last.metrics["skipped"], last.metrics["optimizer_steps"]) == (1, 0)
    with pytest.raises(TrainingError, match="not finite in 3 updates in a row"):
        next(online(different, start=2, state=last.state))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "kto"}, "kto is of single answers"),
        ({"train": {"steps": None}}, "train.steps must be given"),
        ({"sampling": {"temperature": 0}}, "greedy answers to a prompt are all the same"),
        ({"loss": "simpo", "update_reference_every": 1}, "the loss has no reference"),
        ({"update_reference_every": 1, "train": {"lora": {"rank": 2}}}, "cannot update the reference of a LoRA run"),
        ({"loss": "bco", "pairs": "all"}, "set pairs: best_worst"),
        ({"minibatches": 5}, "too few for minibatches"),
        ({"rollouts_per_prompt": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(stage(tmp_path, **changed))
