"""Online preferences: which answers are paired, what is counted, and a reference that stays or follows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from whet.algorithms.online_preference import ranked
from whet.config.loading import load_recipe
from whet.errors import ConfigError
from whet.launch.main import run_recipe
from whet.records import Completion, Ending, Episode, Group, Outcome, Score, Turn
from whet.tracking.log import read_metrics

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
    run_recipe(load_recipe(stage(tmp_path, renew_every=renew)), quiet=True)
    lines = read_metrics(tmp_path / "run" / "stages" / "01-o")
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    at_start = [loss == pytest.approx(math.log(2), abs=1e-6) for loss in losses]
    assert at_start == ([True, True, True] if renew else [True, False, False])
    for line in lines:
        assert line["pairs/prompts"] + line["pairs/tied"] + line["pairs/unscored"] == 4  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "kto"}, "kto is of single answers"),
        ({"train": {"steps": None}}, "train.steps must be given"),
        ({"sampling": {"temperature": 0}}, "greedy answers to a prompt are all the same"),
        ({"loss": "simpo", "renew_every": 1}, "the loss has no reference"),
        ({"renew_every": 1, "train": {"lora": {"rank": 2}}}, "cannot renew the reference of a LoRA run"),
        ({"loss": "bco", "pairs": "all"}, "set pairs: best_worst"),
        ({"minibatches": 5}, "too few for minibatches"),
        ({"rollouts_per_prompt": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(stage(tmp_path, **changed))
