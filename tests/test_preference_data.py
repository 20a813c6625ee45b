"""Comparisons and judged answers: every shape becomes the same records, and prompts are shared exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet.config import DataConfig, GeneratedConfig, ModelConfig
from whet.data.base import Comparison, Judged, Origin, Row
from whet.data.faults import BadRow
from whet.data.preferences import load_comparisons, load_judged, to_comparison, to_judged
from whet.envs.base import Attempt
from whet.envs.families import family
from whet.errors import DataError
from whet.launch.world import LocalWorld
from whet.pipeline.load_data import comparisons, judged
from whet.records import Message
from whet.templates.base import Encoded, Script
from whet.training.answers import compared_stats, ends_only, judged_stats, tokenise_answers

USER, GOOD, BAD = {"role": "user", "content": "2+2?"}, "4", "5"


def comparison(fields: dict[str, Any] | None = None, **values: Any) -> Comparison:
    row = Row(origin=Origin(source="pairs.jsonl", line=7), values=values)
    return to_comparison(row, DataConfig(path="pairs.jsonl", **(fields or {})))


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shape(found: Comparison) -> tuple[list[tuple[str, str]], list[str]]:
    return [(m.role, m.content) for m in found.prompt], [answer[-1].content for answer in found.answers]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
        {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
        {"prompt": "2+2?", "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
        {"chosen_messages": [USER, said(GOOD)], "rejected_messages": [USER, said(BAD)]},
        {"instruction": "2+2?", "input": "", "output": GOOD, "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {"input": {"messages": [USER]}, "preferred_output": [said(GOOD)], "non_preferred_output": [said(BAD)]},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {"prompt": "2+2?", "answers": [BAD, GOOD], "ranks": [2, 1]},
        {"prompt": [USER], "answers": [[said(BAD)], [said(GOOD)]], "scores": [-1.5, 0.25]},
    ],
    ids="+".join,
)
def test_every_shape_of_a_pair_is_the_same_pair(row: dict[str, Any]) -> None:
    assert shape(comparison(**row)) == ([("user", "2+2?")], [GOOD, BAD])


def test_an_implicit_prompt_is_what_both_have_in_common() -> None:
    turns = [USER, said("4"), {"role": "user", "content": "sure?"}]
    found = comparison(chosen=[*turns, said("yes")], rejected=[*turns, said("no")])
    assert shape(found) == ([("user", "2+2?"), ("assistant", "4"), ("user", "sure?")], ["yes", "no"])
    found = comparison(chosen="The sky is blue.", rejected="The sky is black.")
    assert shape(found) == ([("user", "The sky is")], ["blue.", "black."])


def test_a_ranked_list_is_sorted_and_keeps_one_of_each_tie() -> None:
    found = comparison(prompt="x", answers=["c", "a", "b", "d"], scores=[1, 3, 2, 2])
    assert shape(found)[1] == ["a", "b", "c"] and found.tied == 1


def test_margin_confidence_system_and_tools_come_along() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    found = comparison(
        {"system": "Be brief."}, prompt="x", chosen="a", rejected="b", margin=0.5, confidence=0.75, tools=[tool]
    )
    assert (found.margin, found.confidence, found.tools) == (0.5, 0.75, (tool,))
    assert found.prompt[0] == Message(role="system", content="Be brief.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, "rejected: no such column"),
        ({"prompt": "x", "chosen": "a", "rejected": None}, "rejected: no answer"),
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "rejected: empty text"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "rejected: is the same as the chosen answer"),
        ({"chosen": "x a", "rejected": "x a"}, "rejected: is the same as the chosen answer"),
        ({"chosen": "a", "rejected": "b"}, "prompt: no such column, and the texts have no beginning in common"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin: not a finite number"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "0.5"}, "margin: not a finite number"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "confidence": 1.5}, "confidence: not a probability"),
        (
            {"prompt": "3+3?", "chosen": [USER, said("a")], "rejected": [USER, said("b")]},
            "chosen: answers another prompt than the row's own",
        ),
        (
            {"chosen": [USER, said("a")], "rejected": [{"role": "user", "content": "y"}, said("b")]},
            "chosen: another prompt than the other answer's",
        ),
        ({"chosen": [USER, said("a")], "rejected": [USER]}, "rejected: nothing after the common prompt"),
        ({"prompt": [USER, said("a")], "chosen": "b", "rejected": "c"}, "prompt: no message to answer"),
        ({"prompt": "x", "answers": ["a", "b"]}, "neither ranks nor scores"),
        ({"prompt": "x", "answers": ["a", "b"], "ranks": [1]}, "ranks: not one number for each answer"),
        ({"prompt": "x", "answers": ["a", "b"], "ranks": [1, 1]}, "answers: all answers are tied"),
        ({"prompt": "x", "answers": ["a", "a"], "ranks": [1, 2]}, "answers: two answers are the same"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1, float("nan")]}, "scores[1]: not a finite number"),
        ({"chosen": "\n\nHuman: x\n\nAssistant: ", "rejected": "\n\nHuman: x\n\nAssistant: b"}, "chosen[1]: "),
    ],
)
def test_a_bad_row_is_named_with_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow) as error:
        comparison(**row)
    assert str(error.value).startswith(f"pairs.jsonl:7: {message}")


def labelled(**values: Any) -> Judged:
    (found,) = to_judged(Row(origin=Origin(source="kto.jsonl", line=3), values=values), DataConfig(path="kto.jsonl"))
    return found


def test_a_judged_answer_is_the_last_turn_of_any_conversation() -> None:
    for row in ({"prompt": "2+2?", "completion": GOOD}, {"messages": [USER, said(GOOD)]}):
        found = labelled(**row, label=True)
        assert (found.prompt[-1].content, found.answer[0].content, found.good) == ("2+2?", GOOD, True)
        assert labelled(**row, label=0).good is False


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("true", "label: neither true nor false; it is text ('true'); write true for a good answer"),
        (2, "label: neither true nor false; it is a number (2)"),
        (0.0, "label: neither true nor false"),
        (None, "label: is null; write true for a good answer and false for a bad one"),
    ],
)
def test_a_label_is_true_or_false(label: object, message: str) -> None:
    with pytest.raises(BadRow) as error:
        labelled(prompt="x", completion="a", label=label)
    assert str(error.value).startswith(f"kto.jsonl:3: {message}")


def test_a_format_of_one_answer_compares_nothing() -> None:
    with pytest.raises(DataError, match="alpaca compares no answers"):
        comparison({"format": "alpaca"}, prompt="x", chosen="a", rejected="b")


TINY = ModelConfig(path="whet:tiny")


def test_answers_share_their_prompt_and_reward_models_read_the_last_token() -> None:
    template = LocalWorld().template(TINY)
    source = GeneratedConfig(generate="arithmetic", answers=4, count=20)
    given = comparisons(source)[0]
    found, dropped = tokenise_answers(given, template, max_length=100, on_bad_row="error")
    stats = compared_stats(found, given)
    assert not dropped.total and stats.rows == 20 and stats.answers == 80
    for each, read in zip(found, given, strict=True):
        prompt = template.prompt(read.prompt)
        for row, answer in zip(each.atom.rows, read.answers, strict=True):
            assert row.shared == len(prompt) and tuple(row.tokens[: row.shared].tolist()) == prompt
            assert template.decode(row.tokens[row.shared :]) == answer[0].content + "<|im_end|>"
            assert row.trained.tolist() == [False] * row.shared + [True] * (len(row.tokens) - row.shared)
        for row in ends_only(each.atom).rows:
            assert row.trained_count == 1 and row.trained[-1] and row.tokens[-1] in template.stop_ids


def test_the_gate_reports_length_bias_and_never_cuts() -> None:
    template = LocalWorld().template(TINY)
    short = comparison(prompt="x", chosen="abcd", rejected="ab")
    long = comparison(prompt="x", chosen="ab", rejected="a" * 100)
    found, dropped = tokenise_answers([short, short, long], template, max_length=60, on_bad_row="drop")
    stats = compared_stats(found, [short, short, long])
    assert dropped.counts == {"answers[]: longer than max_length 60": 1}
    assert (stats.rows, stats.mean_better, stats.mean_worse, stats.longer_wins) == (2, 5, 3, 1.0)
    with pytest.raises(BadRow, match=r"pairs.jsonl:7: answers\[1\]: longer than max_length 60; it has \d+ tokens"):
        tokenise_answers([long], template, max_length=60, on_bad_row="error")
    found, _ = tokenise_answers([short, long], template, max_length=200, on_bad_row="error")
    assert compared_stats(found, [short, long]).longer_wins == 0.5


def test_a_prompt_that_depends_on_the_answer_is_refused() -> None:
    class Peeking:
        """Writes the length of the answer before the prompt."""

        inner = LocalWorld().template(TINY)
        stop_ids, script = inner.stop_ids, inner.script

        def encode(self, scripts: Sequence[Script], *, most: int | None = None) -> list[Encoded | DataError]:
            return [self.peek(each) for each in self.inner.encode(scripts, most=most)]

        def peek(self, row: Encoded | DataError) -> Encoded:
            assert isinstance(row, Encoded)
            return replace(row, tokens=np.array([row.trained.sum(), *row.tokens[1:]], np.int32))

    with pytest.raises(BadRow, match="writes the prompt differently before this answer"):
        tokenise_answers(
            [comparison(prompt="x", chosen="a", rejected="bc")],
            Peeking(),  # type: ignore[arg-type]
            max_length=60,
            on_bad_row="error",
        )


@pytest.mark.parametrize("kind", [{"generate": "arithmetic", "digits": 2}, {"generate": "countdown"}], ids=str)
def test_generated_answers_are_worth_what_their_order_says(kind: dict[str, Any]) -> None:
    for count in (2, 4):
        config = GeneratedConfig.model_validate({**kind, "answers": count, "count": 50})
        made = family(config)
        for index in range(50):
            worths = [
                made.worth(
                    Attempt(
                        task=made.task(index),
                        messages=(Message(role="assistant", content=answer),),
                        completion_tokens=(),
                        truncated=False,
                        max_tokens=10,
                    )
                )
                for answer in made.ranking(index)
            ]
            assert len(worths) == count and worths == sorted(set(worths), reverse=True)
            if count == 4:
                assert worths == pytest.approx([1, 2 / 3, 1 / 3, 0])
    answers = judged(config)[0]
    assert sum(each.good for each in answers) == 25


REAL = [
    ("rasbt/dev/instruction-data-with-preference.jsonl", {}, 718),
    ("llamafactory/dev/dpo_en_demo.jsonl.gz", {}, 206),
    ("llamafactory/dev/v1_dpo_demo.jsonl", {}, 9),
    ("hh_rlhf/dev/harmless-base_test.jsonl.gz", {}, 1550),
]


@pytest.mark.parametrize(("name", "fields", "rows"), REAL, ids=[name for name, _, _ in REAL])
def test_real_comparisons_are_read(shared_data: Path, name: str, fields: dict[str, Any], rows: int) -> None:
    found, dropped = load_comparisons(DataConfig(path=str(shared_data / name), on_bad_row="drop", **fields))
    assert len(found) == rows and dropped.total <= 3
    assert all(each.answers[0] != each.answers[1] and each.prompt[-1].role != "assistant" for each in found)


def test_real_judged_answers_are_read(shared_data: Path) -> None:
    found, dropped = load_judged(DataConfig(path=str(shared_data / "llamafactory/dev/kto_en_demo.jsonl.gz")))
    assert (len(found), sum(each.good for each in found), dropped.total) == (213, 106, 0)
    template = LocalWorld().template(TINY)
    passed, _ = tokenise_answers(found, template, max_length=4096, on_bad_row="drop")
    assert len(passed) == judged_stats(passed, found).rows == 170
    assert all(each.atom.rows[0].shared for each in passed)
