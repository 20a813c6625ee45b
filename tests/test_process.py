"""Process supervision: step grades from the checker to the tokens, and what becomes of them there, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.test_policy import config, group, own
from whet.algorithms.columns import with_advantages, with_rewards
from whet.algorithms.groups import to_answers
from whet.config import GeneratedConfig, PolicyConfig, RLStage
from whet.config.rewards import StepsReward, VerifierReward
from whet.config.shaping import FormatReward
from whet.envs.base import Attempt, Grade, PlainReward, SingleTurn
from whet.envs.families import family
from whet.envs.families.base import Arithmetic
from whet.envs.rewards.build import build_rubric
from whet.envs.rubric import WeightedRubric
from whet.errors import ConfigError
from whet.formulas.step import RunningScale, steps_to_go
from whet.models.create import byte_tokenizer
from whet.records import Completion, Ending, Group, Message, StepScore, TokenStep, Turn
from whet.rollouts.play import Player, to_token_steps
from whet.sampling.base import SamplingParams
from whet.sampling.scripted import ScriptedSampler
from whet.templates.jinja import JinjaTemplate

TEMPLATE = JinjaTemplate(byte_tokenizer())
(STOP,) = TEMPLATE.stop_ids
TASKS = GeneratedConfig(generate="arithmetic", digits=2, count=4)


def turn(text: str, *, ending: Ending = Ending.STOP) -> Turn:
    tokens = (*TEMPLATE._encoder.one(text), *([STOP] if ending is Ending.STOP else []))
    return Turn(
        prompt=(1,), completion=Completion(tokens=tokens, logprobs=(-1.0,) * len(tokens), version=0, ending=ending)
    )


def with_steps(made: Group, *steps: list[tuple[int, float]]) -> Group:
    episodes = (
        replace(episode, steps=tuple(TokenStep(last=last, value=value) for last, value in given))
        for episode, given in zip(made.episodes, steps, strict=True)
    )
    return replace(made, episodes=tuple(episodes))


# ---------------------------------------------------------------------------------------------- formulas


def test_the_grades_of_later_steps_are_summed_by_hand() -> None:
    """DeepSeekMath 4.1.3 with steps that end at tokens 1 and 3 of 5; the last token ends none."""
    found = steps_to_go(torch.tensor([2.0, -0.5]).double(), torch.tensor([1, 3]), 5)
    assert found.tolist() == [1.5, 1.5, -0.5, -0.5, 0.0]


def test_grades_are_normalised_over_all_steps_of_the_group_by_hand() -> None:
    """Grades 1, 0 | 1, 1: mean 3/4, standard deviation 1/2. The other group's do not matter, equal ones are 0."""
    first = with_steps(group(0, 1, lengths=[4, 3]), [(1, 1), (3, 0)], [(0, 1), (2, 1)])
    second = with_steps(group(0, 1, lengths=[1, 1]), [(0, 7)], [(0, 7)])
    policy = config(preset="grpo_ps")
    answers = to_answers([first, second], own)
    rewarded = with_rewards(answers, policy, kl_coefficient=0.0, spread=RunningScale())
    found = [tuple(a.rows[0].columns["advantage"].tolist()) for a in with_advantages(rewarded, policy, weights={})]
    scale = 0.5 / (0.5 + 1e-6)
    expected = [(-1.0, -1.0, -1.5, -1.5), (1.0, 0.5, 0.5), (0.0,), (0.0,)]
    assert found == [pytest.approx([x * scale for x in row]) for row in expected]


def test_answers_without_steps_have_no_advantage_and_are_in_no_statistic() -> None:
    made = with_steps(group(1, 0, 1, lengths=[2, 2, 2]), [(1, 1)], [(1, 0)], [])
    policy = config(preset="grpo_ps", scale="none")
    rewarded = with_rewards(to_answers([made], own), policy, kl_coefficient=0.0, spread=RunningScale())
    found = [tuple(a.rows[0].columns["advantage"].tolist()) for a in with_advantages(rewarded, policy, weights={})]
    assert found == [(0.5, 0.5), (-0.5, -0.5), (0, 0)]
    nothing = to_answers([with_steps(group(1, 0), [], [])], own)
    rewarded = with_rewards(nothing, policy, kl_coefficient=0.0, spread=RunningScale())
    assert [tuple(a.rows[0].columns["advantage"].tolist()) for a in with_advantages(rewarded, policy, weights={})] == [
        (0, 0),
        (0, 0),
    ]


def test_a_critic_gets_the_grades_as_rewards_of_their_tokens() -> None:
    """0.5 for each right step, the answer's own reward at its end."""
    made = with_steps(group(1, 0, lengths=[4, 2]), [(1, 1), (3, 1)], [(0, 1)])
    policy = config(preset="ppo", kl={"place": "none", "coefficient": 0}, step_weight=0.5)
    rewarded = with_rewards(to_answers([made], own), policy, kl_coefficient=0.0, spread=RunningScale())
    assert [tuple(a.rows[0].columns["reward"].tolist()) for a in rewarded] == [(0, 0.5, 0, 1.5), (0.5, 0)]


# ---------------------------------------------------------------------------------------------- on tokens


def test_a_step_ends_at_the_token_that_completes_it() -> None:
    """Bytes are tokens here: é has two, € three, and half of one completes nothing."""
    text = "é=1;€;x"
    steps = [StepScore(end=end, value=end) for end in (1, 4, 5, 7)]
    found = to_token_steps(turn(text), text, steps, TEMPLATE.decode)
    assert [step.last for step in found] == [1, 4, 7, 10]  # 9 is the x, 10 the stop token: the last step has both
    cut = to_token_steps(turn(text, ending=Ending.LENGTH), text, steps, TEMPLATE.decode)
    assert [step.last for step in cut] == [1, 4, 7, 9]
    (inner,) = to_token_steps(turn("<b>ab</b>"), "ab", [StepScore(end=1, value=1)], TEMPLATE.decode)
    assert inner.last == 3


def test_every_prefix_of_any_text_maps_to_the_token_of_its_last_character() -> None:
    text = "3+4=7; naïve 日本 🙂 done"
    steps = [StepScore(end=end, value=0) for end in range(1, len(text))]
    found = to_token_steps(turn(text), text, steps, TEMPLATE.decode)
    assert [step.last for step in found] == [len(text[: step.end].encode()) - 1 for step in steps]


def test_a_players_episodes_carry_the_steps_of_a_checker() -> None:
    made = Arithmetic(TASKS)
    task = made.task(0)
    gold, steps = task.columns["answer"], made._problem(0).steps
    tokenizer = byte_tokenizer()
    right = f"<think>{steps}</think><answer>{gold}</answer>"
    sampler = ScriptedSampler([right, f"<answer>{gold}</answer>"], encode=tokenizer.encode, decode=tokenizer.decode)
    player = Player(
        sampler=sampler,
        template=TEMPLATE,
        environment=SingleTurn,
        rubric=build_rubric([VerifierReward(kind="verifier"), StepsReward(kind="steps")], made),
        params=SamplingParams(max_tokens=99, stop_ids=TEMPLATE.stop_ids),
        max_length=300,
    )
    worked, bare = player.play([task], 2, step=0, seed=0).groups[0].episodes
    assert [step.value for step in worked.steps] == [1.0] * (steps.count(";") + 2)
    ends = [1 + at for at, sign in enumerate(steps) if sign == ";"]  # <think> is one token, then bytes
    assert [step.last for step in worked.steps][: len(ends)] == ends
    assert worked.steps[-1].last == worked.sampled_tokens - 1
    assert worked.score.value == 1 and worked.score.parts["steps/right"] == 1
    assert [step.value for step in bare.steps] == [1.0]


# ---------------------------------------------------------------------------------------------- checkers


@pytest.mark.parametrize(
    ("answer", "grades"),
    [
        ("<think>5+9+0=14;3+7+1=11</think><answer>114</answer>", [1, 1, 1]),
        ("<think>5+9+0=13;3+7+1=11</think><answer>114</answer>", [0, 1, 1]),
        ("<think>3+7+1=11;5+9+0=14</think><answer>114</answer>", [0, 0, 1]),
        ("<think>5+9+0=14;3+7+1=11;0+0+1=1</think><answer>115</answer>", [1, 1, 0, 0]),
        ("<think></think><answer>114</answer>", [1]),
        ("5+9+0=14;3+7", [1, 0]),
        ("", []),
    ],
)
def test_written_steps_are_checked_one_by_one(answer: str, grades: list[float]) -> None:
    made = Arithmetic(TASKS)
    task = replace(made.task(0), id="arithmetic:0:35+79", columns={"answer": "114"})
    attempt = Attempt(
        task=task, messages=(Message(role="assistant", content=answer),), completion_tokens=(), truncated=False,
        max_tokens=50,
    )  # fmt: skip
    found = made.check_steps(attempt)
    assert [step.value for step in found.steps] == grades
    assert not grades or found.steps[-1].end == len(answer)


def attempt(text: str) -> Attempt:
    task = family(TASKS).task(0)
    said = (Message(role="assistant", content=text),)
    return Attempt(task=task, messages=said, completion_tokens=(), truncated=False, max_tokens=9)


def test_a_rubric_weighs_steps_and_fails_what_is_nowhere() -> None:
    def graded(*steps: tuple[int, float]) -> Grade:
        return Grade(value=None, steps=tuple(StepScore(end=end, value=value) for end, value in steps))

    def reward(name: str, weight: float, grade: Grade) -> PlainReward:
        return PlainReward(name=name, weight=weight, judges=False, function=lambda _: grade)

    value = reward("value", 1.0, Grade(value=1.0))
    both = WeightedRubric([value, reward("a", 2.0, graded((1, 1), (3, 0.5))), reward("b", 1.0, graded((3, 1)))])
    (score,) = both.score([attempt("abcd")], step=0)
    assert (score.value, score.steps) == (1.0, (StepScore(end=1, value=2.0), StepScore(end=3, value=2.0)))
    for wrong, why in [
        (graded((2, math.nan)), "nan"),
        (graded((2, 1), (2, 1)), "ascend"),
        (graded((5, 1)), "within the answer's 4"),
    ]:
        (score,) = WeightedRubric([value, reward("a", 1.0, wrong)]).score([attempt("abcd")], step=0)
        assert score.value is None and score.steps == () and why in score.note


def test_process_supervision_asks_for_step_grades() -> None:
    base = {"kind": "rl", "tasks": {"generate": "arithmetic"}, "train": {"steps": 1}}
    verifier, steps = {"kind": "verifier"}, {"kind": "steps"}
    RLStage.model_validate({**base, "algorithm": "grpo_ps", "rewards": [verifier, steps]})
    for algorithm in ("grpo_ps", {"preset": "ppo", "step_weight": 0.1}):
        with pytest.raises(ValueError, match="needs the grades of steps"):
            RLStage.model_validate({**base, "algorithm": algorithm, "rewards": [verifier]})
    for axes, why in [
        ({"step_weight": 1.0}, "for credit: gae"),
        ({"credit": "process", "kl": {"place": "reward", "coefficient": 0.1}}, "a KL in the reward is none"),
        ({"credit": "process", "baseline": "greedy", "scale": "none"}, "those of steps"),
        ({"credit": "process", "ratio": {"level": "sequence_mean"}}, "one advantage for all tokens"),
    ]:
        with pytest.raises(ValueError, match=why):
            PolicyConfig.model_validate(axes)
    with pytest.raises(ConfigError, match="family checks them"):
        build_rubric([FormatReward(kind="format"), StepsReward(kind="steps")])
