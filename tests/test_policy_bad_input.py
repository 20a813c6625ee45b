"""Bad input to a policy gradient: nothing of it reaches a statistic or the weights, and what it was is said."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.laws.support import tiny_trainer
from tests.test_policy import FakeFeed, config, episode, group, setting
from tests.test_ppo import TINY, recipe, run
from whet.algorithms.groups import drop_nonfinite, listed, to_answers
from whet.algorithms.policy import informative, policy_gradient
from whet.config import CreateConfig, ModelConfig, TrainConfig
from whet.envs.base import Attempt, Grade, PlainReward, Task
from whet.envs.rubric import WeightedRubric
from whet.errors import ModelError, TrainingError
from whet.launch.world import LocalWorld
from whet.models.load import load_scalar_model
from whet.records import Group, Message, Outcome, Step
from whet.training.engine import LocalTrainer


def steps_of(groups: Sequence[Group], *, spoil: int | None = None, steps: int = 1, **axes: object) -> list[Step]:
    """Steps on these groups with a tiny model. `spoil`: the first log-probability of this answer is NaN."""
    trainer = tiny_trainer(dtype=torch.float32)
    trainer.frozen["reference"] = tiny_trainer(dtype=torch.float32).model
    before = {name: p.clone() for name, p in trainer.model.parameters.items()}
    feed = FakeFeed(trainer, lambda: tuple(groups))
    if spoil is not None:
        feed = _Spoilt(trainer, lambda: tuple(groups), spoil)
    found = list(policy_gradient(trainer, feed, setting(config(**axes), steps=steps)))  # type: ignore[arg-type]
    finite = all(bool(p.isfinite().all()) for p in trainer.model.parameters.values())
    assert finite, "no NaN reaches the weights"
    moved = any(not torch.equal(p, before[name]) for name, p in trainer.model.parameters.items())
    assert moved == any(step.metrics["optimizer_steps"] for step in found)
    return found


class _Spoilt(FakeFeed):
    """The sampler reported NaN for the first token of one answer of the first group."""

    def __init__(self, trainer: LocalTrainer, make: object, sample: int) -> None:
        super().__init__(trainer, make)  # type: ignore[arg-type]
        self.sample = sample

    def _sampled(self, given: Group) -> Group:
        found = super()._sampled(given)
        if given.task != "t":
            return found
        bad = found.episodes[self.sample]
        (turn,) = bad.turns
        logprobs = (math.nan, *turn.completion.logprobs[1:])
        spoilt = replace(bad, turns=(replace(turn, completion=replace(turn.completion, logprobs=logprobs)),))
        episodes = tuple(spoilt if i == self.sample else e for i, e in enumerate(found.episodes))
        return replace(found, episodes=episodes)


TWO = (group(1, 0, 1, lengths=[4, 3, 2]), replace(group(1, 0, lengths=[3, 5]), task="u"))


@pytest.mark.parametrize("name", ["grpo", "grpo_ps", "dapo", "reinforce_pp", "gspo", "decoupled_ppo"])
def test_an_answer_with_a_nan_is_left_out_and_named(name: str) -> None:
    preset = {"preset": name, "minibatches": min(2, config(preset=name).minibatches)}
    (step,) = steps_of(TWO, spoil=2, **preset)
    assert step.metrics["not_finite"] == 1 and step.metrics["optimizer_steps"] >= 1
    assert step.notes == ("left out: task t sample 0 (sampler_logp is nan) (rollouts/step-000001.parquet)",)
    assert all(math.isfinite(step.metrics[key]) for key in ("loss", "grad_norm", "entropy", "reward"))


def test_infinity_is_left_out_too_and_a_line_names_three() -> None:
    good, bad = to_answers([group(1, 0)], lambda score: score.value or 0.0)
    count = bad.rows[0].trained_count
    bad = replace(bad, rows=(bad.rows[0].with_columns(ratio=(-math.inf,) * count),))
    assert drop_nonfinite([good, bad]) == ([good], ["task t sample 0 (ratio is -inf)"])
    assert listed(list("abcde"), 7) == "a, b, c and 2 more (rollouts/step-000007.parquet)"
    assert listed(list("abc"), 7) == "a, b, c (rollouts/step-000007.parquet)"


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_traced_to_its_rollouts() -> None:
    """Rewards of 1e300 are finite numbers; float32 has none so large, so the first group's loss is infinite."""
    far = replace(group(1, 0, lengths=[3, 3]), task="far")
    far = replace(far, episodes=tuple(
        replace(e, task="far", sample=i, score=replace(e.score, value=e.score.value * 1e300))  # type: ignore[operator]
        for i, e in enumerate(far.episodes)
    ))  # fmt: skip
    (step,) = steps_of([far, TWO[1]], scale="none")
    assert (step.metrics["skipped"], step.metrics["optimizer_steps"]) == (1, 0)
    (note,) = step.notes
    assert re.fullmatch(
        r"an update was skipped, the gradient of [\w.]+ was not finite: the loss of task far sample 0, "
        r"task far sample 1 \(rollouts/step-000001.parquet\)",
        note,
    )
    (step,) = steps_of([far, TWO[1]], scale="none", minibatches=2)
    assert (step.metrics["skipped"], step.metrics["optimizer_steps"]) == (1, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_reward_that_no_statistic_survives_leaves_its_answer_unscored(value: float) -> None:
    def grade(attempt: Attempt) -> Grade:
        return Grade(value=value)

    rubric = WeightedRubric([PlainReward(name="broken", weight=1.0, judges=False, function=grade)])
    task = Task(id="t", messages=(Message(role="user", content="?"),))
    (score,) = rubric.score(
        [Attempt(task=task, messages=(), completion_tokens=(), truncated=False, max_tokens=1)], step=0
    )
    assert (score.value, score.outcome) == (None, Outcome.GRADER_ERROR) and f"returned {value}" in score.note


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg", "grpo_ps"])
def test_a_group_that_lost_all_but_one_answer_teaches_nothing(name: str) -> None:
    axes = {"preset": name, "kl": {"place": "none", "coefficient": 0}}
    (step,) = steps_of([group(1, None), replace(group(0, None, None), task="u")], **axes)
    assert (step.metrics["optimizer_steps"], step.metrics["unscored"]) == (0, 3)


def test_groups_of_which_nothing_was_scored_leave_the_others_as_they_are() -> None:
    """More groups than scored answers: the statistics of the last group are its own."""
    lost = [replace(group(None, None), task=f"lost {i}") for i in range(3)]
    for name in ("grpo", "rloo", "grpo_ps", "opo", "gpg"):
        axes = {"preset": name, "kl": {"place": "none", "coefficient": 0}}
        (step,) = steps_of([*lost, group(1, 0)], **axes)
        assert (step.metrics["optimizer_steps"], step.metrics["unscored"]) == (1, 6)


def test_a_step_whose_groups_are_all_filtered_away_changes_nothing_and_twenty_stop_the_run() -> None:
    equal = [group(1, 1), replace(group(0, 0), task="u")]
    assert not any(map(informative, equal))
    (step,) = steps_of(equal, preset="dapo")
    assert (step.metrics["groups/trained"], step.metrics["groups/left_out"]) == (0, 2)
    assert step.metrics["optimizer_steps"] == 0 and math.isfinite(step.metrics["reward"])
    with pytest.raises(TrainingError, match=r"for 20 steps: .* of the groups 50% were all wrong and 50% all right"):
        steps_of(equal, preset="dapo", steps=20)


def test_a_step_of_nothing_but_truncated_answers_changes_nothing_under_the_overlong_filter() -> None:
    cut = [replace(group(1, 0), episodes=(episode((5, 6), 1.0, cut=True), episode((7, 8), 0.0, cut=True)))]
    (step,) = steps_of(cut, overlong_filter=True)
    assert step.metrics["optimizer_steps"] == 0 and step.metrics["completions/clipped_ratio"] == 1
    (step,) = steps_of(cut)
    assert step.metrics["optimizer_steps"] == 1  # by itself a cut is no reason


def test_a_step_of_nothing_but_empty_answers_changes_nothing() -> None:
    empty = [group(1, 0, lengths=[0, 0]), replace(group(0, 1, lengths=[0, 0]), task="u")]
    for name in ("grpo", "reinforce_pp", "grpo_ps"):
        (step,) = steps_of(empty, preset=name)
        assert (step.metrics["optimizer_steps"], step.metrics["completions/max_length"]) == (0, 0)


# ------------------------------------------------------------------------------------ where a critic begins


def value_model(folder: Path, *, more: Sequence[str] = ()) -> Path:
    """A reward model on disk whose head is not 0, with further tokens in its vocabulary."""
    model = load_scalar_model(ModelConfig(path="whet:tiny", create=CreateConfig(**TINY)))
    with torch.no_grad():
        model.module.score.weight.fill_(0.05)
    LocalTrainer(model, TrainConfig()).export(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if more:
        spare = sorted(tokenizer.get_vocab().values())[-1]
        assert tokenizer.add_tokens(list(more)) == len(more) and len(tokenizer) > spare
        tokenizer.save_pretrained(folder)
    return folder


def test_a_critic_begins_as_a_reward_model(tmp_path: Path) -> None:
    start = str(value_model(tmp_path / "rm"))
    (fresh, *_), (begun, *_) = (
        run(recipe(tmp_path / name, preset="ppo", minibatches=2, critic={"lr": 1e-3, **more}))
        for name, more in (("fresh", {}), ("begun", {"model": start}))
    )
    assert fresh["value/mean"] == 0 and begun["value/mean"] != 0


def test_a_critic_with_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    other = value_model(tmp_path / "rm", more=["§§"])
    asked = recipe(tmp_path / "run", preset="ppo", minibatches=2, critic={"model": str(other)})
    with pytest.raises(ModelError, match=r"rm: its tokenizer is not that of whet:tiny \(1 tokens differ; '§§' is"):
        run(asked)
    mine = asked.recipe.model
    LocalWorld().scalar_model(mine, TrainConfig(), reads=mine)
