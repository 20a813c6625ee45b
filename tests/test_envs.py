"""Laws of environments and task families: reproducible, never mixed, and every demonstration right."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from whet.config import GeneratedConfig
from whet.config.rewards import ExactReward, MathRewardConfig, VerifierReward
from whet.config.shaping import FormatReward
from whet.envs.base import Attempt, Observed, SingleTurn, Task
from whet.envs.families import Family, family
from whet.envs.families.base import Sum, held_out
from whet.envs.rewards.build import build_rubric
from whet.records import Message

CONFIGS: list[dict[str, Any]] = [
    {"generate": "arithmetic"},
    {"generate": "arithmetic", "digits": 1, "bare": 1.0},
    {"generate": "arithmetic", "digits": 6, "bare": 0.5},
    {"generate": "arithmetic", "digits": 2, "question": "What is {}?"},
    {"generate": "countdown", "numbers": 2},
    {"generate": "countdown"},
    {"generate": "countdown", "numbers": 6},
    {"generate": "functions", "bare": 0.5},
]
every_family = pytest.mark.parametrize("config", CONFIGS, ids=str)


def answered(task: Task, text: str) -> Attempt:
    return Attempt(
        task=task,
        messages=(Message(role="assistant", content=text),),
        completion_tokens=(),
        truncated=False,
        max_tokens=10,
    )


def solved(made: Family, index: int) -> tuple[Task, str]:
    demonstration = made.demonstration(index)
    assert not isinstance(demonstration, str)
    assert demonstration[:-1] == made.task(index).messages and demonstration[-1].role == "assistant"
    return made.task(index), demonstration[-1].content


def problems(config: dict[str, Any], count: int, **changed: Any) -> list[Task]:
    made = family(GeneratedConfig.model_validate({**config, **changed}))
    return [made.task(index) for index in range(count)]


def test_a_single_turn_asks_once() -> None:
    task = Task(id="t", messages=(Message(role="user", content="Q"),))
    assert asyncio.run(SingleTurn(task).start(seed=0)).messages == task.messages
    assert asyncio.run(SingleTurn(task).step(Message(role="assistant", content="A"))) == Observed(over=True)


@every_family
def test_demonstrations_score_one_and_empty_answers_less(config: dict[str, Any]) -> None:
    made = family(GeneratedConfig.model_validate(config))
    rubric = build_rubric([VerifierReward(kind="verifier"), FormatReward(kind="format", weight=0.5)], made)
    for index in range(50):
        task, text = solved(made, index)
        gold = rubric.score([answered(task, text)], step=0)[0]
        assert gold.value == 1.5 and gold.correct is True, text
        for empty in ("", "<answer></answer>", "<think></think><answer></answer>", text.replace("</think>", "")):
            missed = rubric.score([answered(task, empty)], step=0)[0]
            assert missed.parts["verifier"] == 0.0 and missed.correct is False


@every_family
def test_a_problem_depends_on_seed_and_index_alone(config: dict[str, Any]) -> None:
    forwards = problems(config, 30)
    made = family(GeneratedConfig.model_validate({**config, "count": 7}))
    assert [made.task(index) for index in reversed(range(30))] == forwards[::-1]
    assert [task.messages for task in problems(config, 30, seed=1)] != [task.messages for task in forwards]
    assert len({task.id for task in forwards}) == 30


@every_family
def test_held_out_problems_are_never_trained_on_whatever_the_seed(config: dict[str, Any]) -> None:
    def identities(split: str) -> set[object]:
        found: set[object] = set()
        for seed in range(3):
            for task in problems(config, 150, seed=seed, split=split):
                if config["generate"] == "arithmetic":
                    found.add(tuple(sorted(map(int, re.findall(r"\d+", task.messages[0].content)))))
                elif config["generate"] == "countdown":
                    found.add((tuple(sorted(task.columns["numbers"])), task.columns["target"]))
                else:
                    found.add(task.columns["answer"])
        return found

    train, test = identities("train"), identities("test")
    assert train and test and not train & test


def test_a_tenth_is_held_out() -> None:
    share = sum(held_out(str(n)) for n in range(10_000)) / 10_000
    assert abs(share - 0.1) < 0.012, "four standard deviations"


def test_additions_in_columns() -> None:
    assert Sum(35, 79).steps == "5+9+0=14;3+7+1=11"
    assert Sum(7, 105).steps == "7+5+0=12;0+0+1=1;0+1+0=1"
    assert Sum(0, 0).steps == "0+0+0=0"


def test_the_steps_spell_the_total() -> None:
    for task in problems({"generate": "arithmetic", "digits": 4}, 200):
        left, right = map(int, re.findall(r"\d+", task.messages[0].content))
        sums = [step.partition("=")[2] for step in Sum(left, right).steps.split(";")]
        assert sums[-1] + "".join(each[-1] for each in sums[-2::-1]) == str(left + right) == task.columns["answer"]


def test_lengths_are_uniform_and_styles_have_their_share() -> None:
    made = family(GeneratedConfig(generate="arithmetic", digits=3, bare=0.7))
    texts = [solved(made, index) for index in range(1500)]
    lengths = Counter(len(task.messages[0].content.split("+")[0]) for task, _ in texts)
    assert set(lengths) == {1, 2, 3} and all(abs(count - 500) < 75 for count in lengths.values())
    bare = sum(text.startswith("<think></think>") for _, text in texts)
    assert abs(bare - 0.7 * 1500) < 71, "four standard deviations"


def test_plain_text_says_what_the_conversation_says_without_tags() -> None:
    config = {"generate": "arithmetic", "bare": 0.5}
    chat, plain = (family(GeneratedConfig.model_validate({**config, "plain": flag})) for flag in (False, True))
    styles = set()
    for index in range(40):
        task, text = solved(chat, index)
        line = plain.demonstration(index)
        steps = text.removeprefix("<think>").partition("</think>")[0]
        assert isinstance(line, str) and "<" not in line
        assert line.startswith(task.messages[0].content) and line.endswith(task.columns["answer"]) and steps in line
        styles.add(bool(steps))
    assert styles == {True, False}
    countdown = family(GeneratedConfig(generate="countdown", plain=True)).demonstration(0)
    assert isinstance(countdown, str) and "<" not in countdown


def test_a_question_surrounds_the_sum() -> None:
    asked = family(GeneratedConfig(generate="arithmetic", digits=2, question="What is {}?")).task(0)
    plain = family(GeneratedConfig(generate="arithmetic", digits=2)).task(0)
    assert asked.messages[0].content == f"What is {plain.messages[0].content}?"
    with pytest.raises(ValidationError, match="has no place for the sum"):
        GeneratedConfig(generate="arithmetic", question="What is it?")
    with pytest.raises(ValidationError, match="needs generate: arithmetic"):
        GeneratedConfig(generate="countdown", question="Make {}!")


def test_the_arithmetic_verifier_reads_the_answer_and_nothing_else() -> None:
    made = family(GeneratedConfig(generate="arithmetic"))
    task = Task(id="t", messages=(), columns={"answer": "114"})
    right = ["114", "<answer>114</answer>", "<answer> 0114. </answer>", "<think>115</think>114", "35+79=114"]
    wrong = ["115", "<think>114</think>", "<answer>114 or 115</answer>", "<answer>1/0</answer>", "114 115", "x"]
    assert [made.verify(answered(task, text)).value for text in right] == [1.0] * len(right)
    assert [made.verify(answered(task, text)).value for text in wrong] == [0.0] * len(wrong)


@dataclass(frozen=True)
class Case:
    text: str
    value: float


@pytest.mark.parametrize(
    "case",
    [
        Case("3*7-2*4", 1.0), Case("(7*3)-(4*2)", 1.0), Case("2*4/(1)", 0.0), Case("3*7-8", 0.0), Case("3*7-2*4-0", 0),
        Case("3*7-2*2*2", 0.0), Case("13", 0.0), Case("37-24", 0.0), Case("3*7-2*4=13", 1.0), Case("3**7-2*4", 0.0),
        Case("3*7-2*4=14", 0.0),
        Case("7//3*2+4", 0.0), Case("-3+7*2+4", 0.0), Case("7/(3-2-4+3)", 0.0), Case("3*7-2*4 or 1", 0.0),
        Case("__import__('os').system('true')", 0.0), Case("(" * 150, 0.0), Case("9" * 199, 0.0), Case("(3)(7)", 0.0),
        Case("3*7-2*04", 0.0), Case("", 0.0), Case("3*7\n-2*4", 0.0), Case("True*3*7-2*4", 0.0),
    ],
    ids=lambda case: case.text[:12],
)  # fmt: skip
def test_countdown_answers_are_parsed_never_run(case: Case) -> None:
    made = family(GeneratedConfig(generate="countdown", numbers=4))
    task = Task(id="t", messages=(), columns={"numbers": [3, 7, 2, 4], "target": 13})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.verify(answered(task, f"<answer>{case.text}</answer>")).value == case.value


def test_fractions_are_exact() -> None:
    made = family(GeneratedConfig(generate="countdown"))
    task = Task(id="t", messages=(), columns={"numbers": [1, 3, 3, 6], "target": 8})
    assert made.verify(answered(task, "<answer>(1+3/3)*6-6</answer>")).value == 0.0
    task = Task(id="t", messages=(), columns={"numbers": [6, 1, 3, 4], "target": 24})
    assert made.verify(answered(task, "<answer>6/(1-3/4)</answer>")).value == 1.0


def test_countdown_judges_given_solutions_of_others(shared_data: Path) -> None:
    with gzip.open(shared_data / "countdown/dev/countdown_3to6.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    made = family(GeneratedConfig(generate="countdown"))
    for row in rows:
        task = Task(id="t", messages=(), columns={"numbers": row["nums"], "target": row["target"]})
        other = Task(id="t", messages=(), columns={"numbers": row["nums"], "target": row["target"] + 1})
        text = f"<answer>{row['solution']}</answer>"
        assert made.verify(answered(task, text)).value == 1.0 and made.verify(answered(other, text)).value == 0.0


def test_other_rewards_understand_the_families_answers() -> None:
    made = family(GeneratedConfig(generate="arithmetic"))
    rubric = build_rubric([MathRewardConfig(kind="math"), ExactReward(kind="exact")])
    rubric.check([made.task(index) for index in range(20)])
    scores = rubric.score([answered(*solved(made, index)) for index in range(20)], step=0)
    rubric.close()
    assert {score.value for score in scores} == {2.0}
