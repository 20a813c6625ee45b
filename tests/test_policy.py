"""The policy-gradient space: what it refuses, what a step's columns are, and that every preset runs and is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.laws.support import gradients, logps_of, tiny_trainer
from whet.algorithms.columns import sequence_kl, with_filters, with_rewards
from whet.algorithms.columns import with_advantages as from_rewards
from whet.algorithms.groups import Answer, to_answers
from whet.algorithms.policy import informative, policy_gradient, prepare, weigh
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.state import Coefficients, RunState, Setting
from whet.config import PRESETS, LoraConfig, PolicyConfig, RLStage, TrainConfig
from whet.errors import TrainingError
from whet.formulas.step import RunningScale
from whet.records import Completion, Ending, Episode, Group, Outcome, Score, TokenStep, Turn
from whet.rollouts.feed import Keep, Taken
from whet.training.engine import LocalTrainer


def config(**axes: object) -> PolicyConfig:
    return PolicyConfig.model_validate(axes)


WITHOUT_CRITIC = [name for name in PRESETS if config(preset=name).critic is None]


def episode(tokens: tuple[int, ...], reward: float | None, *, right: bool | None = None, cut: bool = False) -> Episode:
    turn = Turn(
        prompt=(1, 2, 3),
        completion=Completion(tokens=tokens, logprobs=(-1.0,) * len(tokens), version=0, ending=Ending.STOP),
    )
    return Episode(
        task="t", sample=0, seed=0, messages=(), turns=(turn,),
        score=Score(value=reward, parts={"reward": reward}, correct=right),
        outcome=Outcome.TRUNCATED if cut else Outcome.FINISHED,
        steps=() if reward is None or not tokens else (TokenStep(last=len(tokens) - 1, value=reward),),
    )  # fmt: skip


def group(*rewards: float | None, lengths: Sequence[int] = (), greedy: float | None = None) -> Group:
    lengths = lengths or [2] * len(rewards)
    episodes = tuple(
        episode(tuple(range(5 + i, 5 + i + n)), reward, right=reward == 1)
        for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True))
    )
    return Group(task="t", episodes=episodes, greedy=None if greedy is None else episode((9,), greedy))


def own(score: Score) -> float:
    """The reward where no constraint charges for anything."""
    assert score.value is not None
    return score.value


def with_advantages(answers: Sequence[Answer], policy: PolicyConfig, *, kl_coefficient: float) -> list[Answer]:
    rewarded = with_rewards(answers, policy, kl_coefficient=kl_coefficient, spread=RunningScale())
    return from_rewards(rewarded, policy, weights={"reward": 1.0})


def prepared(trainer: LocalTrainer, groups: Sequence[Group], chosen: Setting) -> list[Answer]:
    return prepare(trainer, None, to_answers(groups, own), chosen, RunState.start(chosen, {}), step=0).answers


@dataclass
class FakeFeed:
    """Groups whose sampler log-probabilities are the trainer's own: exactly on-policy."""

    trainer: LocalTrainer
    make: Callable[[], tuple[Group, ...]]
    position: int = 0

    def take(self, count: int, *, step: int, keep: Keep | None = None, rounds: int = 1) -> Taken:
        self.position += count
        groups = tuple(self._sampled(group) for group in self.make())
        kept = tuple(group for group in groups if keep is None or keep(group))
        left_out = tuple(group for group in groups if group not in kept)
        return Taken(groups=kept, left_out=left_out, rounds=1, rollout_s=1.0, score_s=0.0)

    @property
    def state(self) -> dict[str, float]:
        return {"position": float(self.position)}

    def publish(self, version: int) -> None:
        pass

    def _sampled(self, group: Group) -> Group:
        rows = [row for answer in to_answers([replace(group, greedy=None)], own) for row in answer.rows]
        logps = iter(logps_of(self.trainer, rows))
        return replace(
            group,
            episodes=tuple(
                replace(e, turns=tuple(
                    replace(t, completion=replace(t.completion, logprobs=next(logps))) for t in e.turns
                )) if e.score.value is not None else e
                for e in group.episodes
            ),
        )  # fmt: skip


def setting(policy: PolicyConfig, *, steps: int = 2) -> Setting:
    return Setting(
        config=policy, train=TrainConfig(lr=1e-3), steps=steps, prompts_per_step=2, temperature=1.0, max_tokens=16,
        max_gap=0.01, weights={"reward": 1.0},
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"kl": {"place": "loss", "estimator": "k1", "coefficient": 0.1}}, "expected gradient of zero"),
        ({"kl": {"place": "reward", "estimator": "k3", "coefficient": 0.1}}, "only k1"),
        ({"kl": {"place": "loss"}}, "coefficient is 0"),
        ({"kl": {"coefficient": 0.1}}, "nothing else here has an effect"),
        ({"credit": "return_to_go"}, "equals outcome"),
        ({"baseline": "none"}, "needs a group's baseline"),
        ({"baseline": "batch_mean", "scale": "informative_share"}, "needs a group's baseline"),
        ({"preset": "gspo", "token_filter": {"kind": "high_entropy"}}, "one advantage for all tokens"),
        ({"preset": "reinforce_pp", "ratio": {"level": "sequence_mean"}}, "one advantage for all tokens"),
        ({"preset": "gmpo", "token_filter": {"kind": "covariance"}}, "one advantage for all tokens"),
        ({"ratio": {"level": "none"}}, "bounds a ratio"),
        ({"preset": "rloo", "minibatches": 2}, "right for the first update only"),
        ({"preset": "cispo", "ratio": {"level": "sequence_mean"}}, "defined for the ratio of tokens"),
        ({"preset": "dppo", "correction": {"kind": "truncate"}}, "would do it twice"),
        ({"correction": {"low": 2.0, "high": 1.0}}, "below correction.high"),
        ({"clip": {"kind": "cispo", "low": 0.2}}, "Extra inputs"),
        ({"preset": "gdpo", "baseline": "batch_mean"}, "compares the answers of a group"),
        ({"preset": "gdpo", "credit": "process"}, "of the rewards of whole answers"),
        ({"preset": "gdpo", "kl": {"place": "reward", "coefficient": 0.1}}, "of the rewards of whole answers"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(axes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(**axes)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"rollouts_per_prompt": 1}, "a group of one has no baseline"),
        ({"prompts_per_step": 1, "algorithm": "lite_ppo"}, "more than one group"),
        ({"algorithm": "gdpo", "prompts_per_step": 1}, "several rewards, and one alone"),
        ({"algorithm": "dapo", "rewards": [{"kind": "format"}]}, "no reward judges that"),
        ({"algorithm": "r1", "train": {"steps": 1, "lora": {}}}, "cannot update the reference of a LoRA run"),
    ],
)
def test_a_stages_numbers_must_fit_its_algorithm(stage: dict[str, object], reason: str) -> None:
    base = {"kind": "rl", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}], "train": {"steps": 1}}
    RLStage.model_validate(base)
    with pytest.raises(ValidationError, match=reason):
        RLStage.model_validate(base | stage)


def test_algorithms_without_a_groups_baseline_may_sample_once() -> None:
    base = {"kind": "rl", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}], "train": {"steps": 1}}
    for name in ("remax", "reinforce_pp"):
        RLStage.model_validate(base | {"algorithm": name, "rollouts_per_prompt": 1})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_resolved_form(name: str) -> None:
    """What `whet plan` prints is the same point."""
    policy = config(preset=name)
    assert PolicyConfig.model_validate(policy.model_dump()) == policy


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_with_a_clip_of_its_own_makes_several_updates(name: str) -> None:
    """With one update of each batch the ratio is 1 and nothing is clipped, whatever the bounds."""
    axes = PRESETS[name]
    if (axes.get("clip", {"kind": "none"}).get("kind") != "none") or axes.get("token_filter", {}).get("kind"):
        assert config(preset=name).minibatches >= 4


@pytest.mark.parametrize("name", ["dapo", "high_entropy"])
def test_clip_higher_clips(name: str) -> None:
    trainer = tiny_trainer(dtype=torch.float32, lr=0.05)
    (step,) = policy_gradient(trainer, FakeFeed(trainer, _two_groups), setting(config(preset=name), steps=1))  # type: ignore[arg-type]
    assert step.metrics["optimizer_steps"] == 2  # whole groups, and there are two
    assert step.metrics["clip_ratio/high_mean"] + step.metrics["clip_ratio/low_mean"] > 0


def test_keys_beside_a_preset_replace_its_own_axis_by_axis() -> None:
    assert config(preset="dapo", clip={"high": 0.3}).clip.model_dump(exclude={"dual"}) == {
        "kind": "ppo", "low": 0.2, "high": 0.3,
    }  # fmt: skip
    assert config(preset="gspo", clip={"kind": "sapo"}).clip.positive == 1.0
    assert config(preset="grpo", kl={"coefficient": 0.1}).kl.place == "loss"


# --------------------------------------------------------------------------------------------- columns


def advantages(groups: Sequence[Group], policy: PolicyConfig, kl: float = 0.0) -> list[tuple[float, ...]]:
    answers = with_advantages(to_answers(groups, own), policy, kl_coefficient=kl)
    return [tuple(row.columns["advantage"].tolist()) for answer in answers for row in answer.rows]


def test_the_greedy_answer_is_remaxs_baseline() -> None:
    policy = config(preset="remax", kl={"place": "none", "coefficient": 0})
    assert advantages([group(1, 0, greedy=0.25), group(1, greedy=1)], policy) == [(0.75,) * 2, (-0.25,) * 2, (0, 0)]
    unscored = replace(group(1), greedy=episode((9,), None))
    assert advantages([unscored, group(1, greedy=0)], policy) == [(1, 1)]


def test_unscored_answers_are_in_no_statistic() -> None:
    assert advantages([group(1, None, 0)], config(scale="none")) == [(0.5, 0.5), (-0.5, -0.5)]


def test_a_kl_in_the_reward_by_hand() -> None:
    """k1 of the two tokens: 0.3 and -0.1; coefficient 10."""
    answers = to_answers([group(1, 1)], own)
    reference = [(-1.3, -0.9), (-1.0, -1.0)]
    answers = [
        replace(answer, rows=(answer.rows[0].with_columns(ref_logp=ref),))
        for answer, ref in zip(answers, reference, strict=True)
    ]
    assert sequence_kl(answers) == pytest.approx(0.1)
    rloo = config(preset="rloo")
    found = [a.rows[0].columns["advantage"] for a in with_advantages(answers, rloo, kl_coefficient=10.0)]
    assert found == [pytest.approx((-2, -2)), pytest.approx((2, 2))]  # rewards -1 and 1, each the other's baseline
    to_go = config(preset="reinforce_pp", scale="none")
    found = [a.rows[0].columns["advantage"] for a in with_advantages(answers, to_go, kl_coefficient=10.0)]
    assert found == [pytest.approx((-1, 2)), pytest.approx((1, 1))]


def test_a_masked_token_counts_in_the_denominator_and_a_filtered_answer_does_not() -> None:
    trainer = tiny_trainer()
    groups = [group(1, 0, lengths=[3, 3])]
    cut = replace(
        groups[0], episodes=(groups[0].episodes[0], replace(groups[0].episodes[1], outcome=Outcome.TRUNCATED))
    )
    high = config(preset="high_entropy", token_filter={"kind": "high_entropy", "share": 1 / 3})
    atoms = weigh(prepared(trainer, groups, setting(high)), setting(high))
    rows = [row for atom in atoms for row in atom.rows]
    assert sum(x != 0 for row in rows for x in row.columns["advantage"]) == 2
    assert {w for row in rows for w in row.columns["weight"]} == {1 / 6}
    over = config(overlong_filter=True)
    atoms = weigh(prepared(trainer, [cut], setting(over)), setting(over))
    assert [row.columns["weight"].tolist() for atom in atoms for row in atom.rows] == [[1 / 3] * 3]


def test_covariance_brakes_choose_few_tokens() -> None:
    answers = with_advantages(to_answers([group(1, 0, lengths=[4, 4])], own), config(), kl_coefficient=0)
    cov = [0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0]
    logps = [-1 - c for c in cov]  # with advantages of two values the covariance follows log p
    answers = [
        replace(a, rows=(a.rows[0].with_columns(old_logp=tuple(logps[4 * i : 4 * i + 4])),))
        for i, a in enumerate(answers)
    ]
    marked = with_filters(answers, None, config(preset="kl_cov"), temperature=1, seed=0)  # type: ignore[arg-type]
    assert [x for a in marked for x in a.rows[0].columns["kl_cov"]] == [0] * 7 + [1]
    clip = config(preset="clip_cov", token_filter={"kind": "covariance", "share": 1.0, "low": 2.0, "high": 99.0})
    kept = with_filters(answers, None, clip, temperature=1, seed=0)  # type: ignore[arg-type]
    assert [x != 0 for a in kept for x in a.rows[0].columns["advantage"]] == [True] * 7 + [False]


def test_dynamic_sampling_asks_for_correctness_and_never_for_the_shaped_reward() -> None:
    right = [episode((5,), reward, right=True) for reward in (1.0, 0.4)]
    assert not informative(Group(task="t", episodes=tuple(right)))
    assert informative(Group(task="t", episodes=(right[0], episode((5,), 1.0, right=False))))


# ------------------------------------------------------------------------------------------------ loop


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_every_preset_learns_the_better_answer(name: str) -> None:
    """Two answers to one prompt; after a few steps the better one is likelier against the other than it was."""
    trainer = _with_reference(tiny_trainer(dtype=torch.float32))
    more = {"token_filter": {"share": 0.6}} if name == "high_entropy" else {}  # a fifth of 16 tokens is too few
    policy = config(preset=name, minibatches=min(2, config(preset=name).minibatches), **more)
    make = partial(_two_groups)
    rows = [answer.rows[0] for answer in to_answers([make()[0]], own)]

    def lead() -> float:
        good, bad = (sum(logp) for logp in logps_of(trainer, rows))
        return good - bad

    before = lead()
    steps = list(policy_gradient(trainer, FakeFeed(trainer, make), setting(policy, steps=4)))  # type: ignore[arg-type]
    assert lead() > before
    assert all(torch.isfinite(torch.tensor(list(step.metrics.values()))).sum() for step in steps)
    assert steps[0].metrics["sampling/logp_gap_mean"] < 1e-5
    assert steps[0].metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if config(preset=name).kl.place != "loss" and config(preset=name).critic is None]
)
def test_equal_rewards_change_nothing(name: str) -> None:
    """Law 7 of the metamorphic ones; REINFORCE++ and ReMax would push on the KL alone, so it is off."""
    credit = config(preset=name).credit if config(preset=name).credit in ("turns", "tree") else "outcome"
    policy = config(preset=name, kl={"place": "none", "coefficient": 0}, credit=credit)
    if policy.kl_cov is not None:
        policy = config(preset=name, kl_cov=None)
    chosen = setting(policy)
    answers = prepared(tiny_trainer(), [group(1, 1, greedy=1), group(1, 1, greedy=1)], chosen)
    assert weigh(answers, chosen) == []


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp", "gspo", "opo", "high_entropy"])
def test_an_answer_without_tokens_counts_in_the_statistics_and_trains_nothing(name: str) -> None:
    trainer = _with_reference(tiny_trainer(dtype=torch.float32))

    def make() -> tuple[Group, ...]:
        return (group(1, 0, 0, lengths=[4, 0, 2]), replace(group(1, 0, lengths=[3, 5]), task="u"))

    policy = config(preset=name, minibatches=min(2, config(preset=name).minibatches))
    step = next(policy_gradient(trainer, FakeFeed(trainer, make), setting(policy)))  # type: ignore[arg-type]
    assert step.metrics["optimizer_steps"] >= 1 and step.metrics["skipped"] == 0
    assert step.metrics["completions/min_length"] == 0


def test_a_step_of_nothing_but_unscored_answers_changes_nothing() -> None:
    trainer = tiny_trainer(dtype=torch.float32)
    before = {name: p.clone() for name, p in trainer.model.parameters.items()}
    feed = FakeFeed(trainer, lambda: (group(None, None), group(None)))
    step = next(policy_gradient(trainer, feed, setting(config())))  # type: ignore[arg-type]
    assert step.metrics["optimizer_steps"] == 0 and step.metrics["unscored"] == 3
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.parameters.items())


def test_the_first_ratio_must_be_one() -> None:
    """A dropout acts in the update and not in the pass before it: the run stops at step one and names the cause."""
    dropout = LoraConfig(rank=4, dropout=0.6)
    trainer = tiny_trainer(dtype=torch.float32, lora=dropout, lr=1e-3)
    for name, p in trainer.model.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data)
    policy = config(minibatches=2)
    feed = FakeFeed(trainer, _two_groups)
    loop = policy_gradient(trainer, feed, replace(setting(policy), max_gap=9.0))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="first ratio is not 1"):
        next(loop)


@pytest.mark.parametrize(
    ("tokens", "wrong", "complaint"),
    [(2, 1.0, "disagree by 0.06"), (2, 0.3, "by more than 0.25 nats on 6"), (1, 0.3, None)],
)
def test_sampler_and_trainer_must_agree_in_the_mean_and_on_99_of_100_tokens(
    tokens: int, wrong: float, complaint: str | None
) -> None:
    """Tokens of 32 are `wrong`; a max_gap of 0.05 passes a mean of 0.019, but not the tail; one of a few is no tail."""
    trainer = tiny_trainer(dtype=torch.float32)

    class Wrong(FakeFeed):
        def _sampled(self, group: Group) -> Group:
            first, *others = super()._sampled(group).episodes
            if group.task == "t":
                (turn,) = first.turns
                logprobs = turn.completion.logprobs + wrong * (np.arange(8) < tokens)
                first = replace(first, turns=(replace(turn, completion=replace(turn.completion, logprobs=logprobs)),))
            return replace(group, episodes=(first, *others))

    def make() -> tuple[Group, ...]:
        return group(1, 0, lengths=[8, 8]), replace(group(1, 0, lengths=[8, 8]), task="u")

    loop = policy_gradient(trainer, Wrong(trainer, make), replace(setting(config()), max_gap=0.05))  # type: ignore[arg-type]
    if complaint is None:
        assert next(loop).metrics["sampling/logp_gap_far"] == pytest.approx(1 / 32)
        return
    with pytest.raises(TrainingError, match=complaint):
        next(loop)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_weighs_answers_by_their_length_unawares(name: str) -> None:
    assert config(preset=name).cautions(prompts=16) == []


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"preset": "gspo", "reduction": "token_mean"}, "ratio.level: sequence_mean"),
        ({"preset": "gmpo", "reduction": "sequence_sum"}, "clip: geometric"),
        ({"kl": {"place": "loss", "level": "sequence", "coefficient": 0.1}}, "kl.level: sequence"),
    ],
)
def test_a_term_of_whole_answers_that_is_counted_by_tokens_is_warned_of(axes: dict[str, object], names: str) -> None:
    (line,) = config(**axes).cautions(prompts=4)
    assert names in line and "sequence_mean" in line


def test_fewer_prompts_than_updates_are_said() -> None:
    (line,) = config(preset="dapo").cautions(prompts=2)
    assert "2 of the 4 updates" in line and "no clip" not in line
    assert "no clip" in config(preset="dapo").cautions(prompts=1)[0]


def test_the_first_kl_must_be_zero() -> None:
    trainer = _with_reference(tiny_trainer(dtype=torch.float32))
    with torch.no_grad():
        for p in trainer.frozen["reference"].module.parameters():
            p.mul_(1.5)
    loop = policy_gradient(trainer, FakeFeed(trainer, _two_groups), setting(config(preset="grpo")))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="its own reference"):
        next(loop)


def test_a_corrections_bounds_are_those_of_its_kind() -> None:
    assert config(correction={}).correction.high == 2.0  # type: ignore[union-attr]
    masked = config(correction={"kind": "mask"})
    assert (masked.correction.low, masked.correction.high) == (0.5, 5.0)  # type: ignore[union-attr]
    assert config(correction={"kind": "mask", "high": 3}).correction.high == 3  # type: ignore[union-attr]
    assert PolicyConfig.model_validate(masked.model_dump()) == masked


def test_counts_go_on_from_a_steps_state() -> None:
    chosen, idle = setting(config()), {"optimizer_steps": 0.0, "value/optimizer_steps": 0.0}

    def after(standing: RunState, **learnt: float) -> tuple[RunState, tuple[float, float]]:
        """The next one, begun again from what it saves."""
        made = standing.after(idle | learnt, chosen, answers=4)
        assert RunState.start(chosen, made.saved) == made
        return made, (made.updates, made.barren)

    standing, _ = after(RunState.start(chosen, {}))
    standing, counts = after(standing)
    assert counts == (0, 2), "steps from which nobody learnt"
    assert after(standing, **{"value/optimizer_steps": 1.0})[1] == (0, 0), "the critic did"
    standing, _ = after(standing, optimizer_steps=3.0)
    assert after(standing, optimizer_steps=2.0)[1] == (5, 0)


def test_controllers_go_on_from_a_steps_state() -> None:
    policy = config(preset="grpo", kl={"target": 0.5, "horizon": 10}, entropy={"target": 9.0})
    trainer = _with_reference(tiny_trainer(dtype=torch.float32))
    first, second = policy_gradient(trainer, FakeFeed(trainer, _two_groups), setting(policy))  # type: ignore[arg-type]
    # Step one: the KL is 0, so its coefficient falls by 20 % x 4 answers / 10; entropy is below 9, so its own rises.
    assert second.metrics["kl/coefficient"] == pytest.approx(0.04 * 0.92)
    assert second.metrics["entropy/coefficient"] == pytest.approx(0.005)
    assert Coefficients.start(policy, first.state) == Coefficients(kl=pytest.approx(0.04 * 0.92), entropy=0.005)


def test_the_reference_is_renewed_and_survives_a_checkpoint(tmp_path) -> None:
    trainer = _with_reference(tiny_trainer(dtype=torch.float32))
    rows = [answer.rows[0] for answer in to_answers(_two_groups(), own)]
    policy = config(preset="grpo", kl={"update_every": 2})
    list(policy_gradient(trainer, FakeFeed(trainer, _two_groups), setting(policy)))  # type: ignore[arg-type]
    now = logps_of(trainer, rows)
    assert logps_of(trainer, rows, frozen="reference") == now
    trainer.save(tmp_path)
    resumed = _with_reference(tiny_trainer(dtype=torch.float32))
    resumed.load(tmp_path)
    assert logps_of(resumed, rows, frozen="reference") == now


def test_an_entropy_bonus_keeps_more_entropy() -> None:
    def final(coefficient: float) -> float:
        trainer = tiny_trainer(dtype=torch.float32)
        policy = config(entropy={"coefficient": coefficient})
        return list(policy_gradient(trainer, FakeFeed(trainer, _two_groups), setting(policy, steps=5)))[-1].metrics[
            "entropy"
        ]  # type: ignore[arg-type]

    assert final(1.0) > final(0.0)


def test_doubling_the_entropy_coefficient_doubles_its_gradient() -> None:
    trainer = tiny_trainer()
    answers = prepared(trainer, _two_groups(), setting(config()))
    found = []
    for coefficient in (0.0, 0.5, 1.0):
        policy = config(entropy={"coefficient": coefficient})
        objective = policy_loss(policy, temperature=1.0, kl_coefficient=0, entropy_coefficient=coefficient)
        trainer.forward_backward(weigh(answers, setting(policy)), objective)
        found.append(gradients(trainer))
    for name in found[0]:
        torch.testing.assert_close(found[2][name] - found[0][name], 2 * (found[1][name] - found[0][name]))


def _two_groups() -> tuple[Group, ...]:
    return (group(1, 0, lengths=[4, 4], greedy=0.5), replace(group(1, 0, lengths=[3, 5], greedy=0.5), task="u"))


def _with_reference(trainer: LocalTrainer) -> LocalTrainer:
    trainer.frozen["reference"] = tiny_trainer(dtype=torch.float32).model
    return trainer


def test_every_scored_answer_leaves_with_its_advantage() -> None:
    """Means over tokens, with mean 0 in a group whose answers are of one length; None for what was left out."""
    trainer = tiny_trainer(dtype=torch.float32)
    make = partial(lambda: (group(1, 0, None, 0), group(1, 1)))
    feed = FakeFeed(trainer, make)
    (step, *_) = policy_gradient(trainer, feed, setting(config(scale="none")))  # type: ignore[arg-type]
    first, second = ([e.advantage for e in g.episodes] for g in step.groups)
    assert first == [pytest.approx(2 / 3), pytest.approx(-1 / 3), None, pytest.approx(-1 / 3)]
    assert second == [0.0, 0.0]
