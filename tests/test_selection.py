"""Sampling and selecting: every answer is a row, every filter leaves out what it says, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from whet.config.loading import load_recipe
from whet.errors import ConfigError, DataError, RewardError
from whet.launch.main import run_recipe
from whet.pipeline.stages.select import jaccard, leaks, ngrams, words

HEAD = "name: s\nmodel: whet:demo\nout: run\nthreads: 1\nstages:\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: dict[str, Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(stage: str, file: str = "rows.jsonl") -> list[dict[str, Any]]:
    path = Path("run/stages", stage, file)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(stages: str, *words: str) -> None:
    Path("s.yaml").write_text(HEAD + stages)
    run_recipe(load_recipe("s.yaml", words), quiet=True)


def answer(prompt: str, completion: str, *, right: bool, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "correct": right, "reward": float(right), **more}


ANSWERS = (
    answer("1+1", "two", right=True),
    answer("1+1", "two", right=True),
    answer("1+1", "it is two", right=True, reward=0.5),
    answer("1+1", "three", right=False),
    answer("2+2", "five", right=False),
    answer("2+2", "six", right=False),
)


def select(keys: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    write("rows.jsonl", *(rows or ANSWERS))
    shutil.rmtree("run", ignore_errors=True)
    run(f"  keep: {{kind: select, data: rows.jsonl, {keys}}}\n")
    return read("01-keep")


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ("max_similarity: null", ["two", "two", "it is two", "three", "five", "six"]),
        ("max_similarity: 1", ["two", "it is two", "three", "five", "six"]),
        ("correct: true", ["two", "it is two"]),
        ("correct: false", ["three", "five", "six"]),
        ("min_reward: 0.6", ["two"]),
        ("best: 1", ["two", "five"]),
        ("difficulty: [0.5, 1]", ["two", "it is two", "three"]),
        ("difficulty: [0, 0]", ["five", "six"]),
        ("correct: true, best: 1", ["two"]),
    ],
)
def test_each_filter_keeps_what_it_says_and_keeps_the_rest_with_its_reason(keys: str, left: list[str]) -> None:
    rows = select(keys)
    assert texts(rows) == left
    dropped = read("01-keep", "dropped/data.jsonl")
    assert len(rows) + len(dropped) == len(ANSWERS), "every row is kept, or kept as dropped"
    assert all(row["reason"] and row["row"].startswith("rows.jsonl:") for row in dropped)
    (line,) = read("01-keep", "metrics.jsonl")
    counted = {name: count for name, count in line.items() if name.startswith("left_out/")}
    assert sum(counted.values()) == len(dropped)


def test_the_share_of_right_answers_is_of_the_prompt_or_what_the_rows_say() -> None:
    assert [row["solved"] for row in select("max_similarity: null")] == [0.75] * 4 + [0.0] * 2
    said = [answer("1+1", text, right=True, solved=0.25) for text in ("a", "b")]  # others were cut off
    assert {row["solved"] for row in select("correct: true", *said)} == {0.25}


def test_pairs_are_the_best_over_the_worst_and_only_where_they_differ() -> None:
    rows = select("write: pairs")
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [("two", "three")]
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"]) == (1.0, 0.0)
    assert {row["reason"] for row in read("01-keep", "dropped/data.jsonl")} == {
        "too similar to another",
        "not in a pair",
    }


def test_pairs_of_a_right_and_a_wrong_answer() -> None:
    rows = (answer("p", "a", right=True, reward=0.9), answer("p", "b", right=True, reward=0.1))
    assert len(select("write: pairs", *rows)) == 1
    with pytest.raises(DataError, match="nothing is left of 2 rows: 2 not in a pair"):
        select("write: pairs, correct: true", *rows)
    several = [answer("p", text, right=text < "c", reward=1.0 - ord(text) / 1000) for text in "abcd"]
    assert [r["rejected"][0]["content"] for r in select("write: pairs, best: 2", *several)] == ["d", "c"]


def test_tasks_are_prompts_once_with_their_columns_and_difficulty() -> None:
    rows = [answer("1+1", "two", right=True, gold="2"), answer("1+1", "3", right=False, gold="2")]
    (task,) = select("write: tasks, difficulty: [0.1, 0.9]", *rows)
    assert task["prompt"] == [{"role": "user", "content": "1+1"}] and task["gold"] == "2" and task["solved"] == 0.5
    assert not {"completion", "reward", "correct"} & set(task)


def test_rows_are_graded_where_they_are_selected() -> None:
    """A verifier by a gold column: rows of a file that nobody has graded, and a public format with turns."""
    rows = (
        {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "#### 4"}], "answer": "4"},
        {"messages": [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "#### 4"}], "answer": "5"},
    )
    kept = select("rewards: [{kind: math}], correct: true", *rows)
    assert texts(kept) == ["#### 4"] and kept[0]["reward"] == 1.0 and kept[0]["solved"] == 1.0


def test_a_judge_selects_and_one_that_is_silent_is_no_selection() -> None:
    Path("judge.py").write_text(
        "def longer(messages):\n"
        "    return 'Verdict: ' + ('10' if 'it is two' in messages[-1]['content'] else '1')\n"
        "def mute(messages):\n    return 'hm'\n"
    )
    judge = "rewards: [{kind: judge, model: {script: 'judge.py:%s'}, probe: false}], best: 1"
    kept = select(judge % "longer", *ANSWERS[2:4])
    assert texts(kept) == ["it is two"] and kept[0]["reward"] == 1.0
    with pytest.raises(RewardError, match="most of chunk 1 of 1 could not be judged"):
        run("  keep: {kind: select, data: rows.jsonl, %s}\n" % (judge % "mute"), "out=mute")


def test_near_duplicates_and_evaluation_sets() -> None:
    assert words("What is 3 - 5?") != words("What is 3 + 5?"), "an operator is a word"
    assert jaccard(ngrams("a b c d", 3), ngrams("a b c d", 3)) == 1 and jaccard(ngrams("a b", 3), ngrams("c", 3)) == 0
    near = [
        answer("p", "one two three four five six", right=True),
        answer("p", "one two three four five 6", right=True),
    ]
    assert len(select("max_similarity: 0.5", *near)) == 1
    assert len(select("max_similarity: 0.7", *near)) == 2
    sentence = "how many apples has a farmer left who sold half of his ninety apples"
    assert leaks([(sentence,)], 13) and not leaks([(sentence,)], 13) & ngrams("how many apples", 13)
    assert not leaks([(f"please answer {number}",) for number in range(11)], 2) & {("please", "answer")}
    write("test.jsonl", {"prompt": f"{sentence}, today"}, {"prompt": "2+2?"})
    rows = [answer(f"Tell me: {sentence}.", "45", right=True), answer("2 + 2", "4", right=True), ANSWERS[0]]
    assert texts(select("decontaminate: test.jsonl", *rows)) == ["two"]
    reasons = [row["reason"] for row in read("01-keep", "dropped/data.jsonl")]
    assert reasons == ["shared with an evaluation set"] * 2


def test_a_selection_that_leaves_nothing_says_what_each_filter_took() -> None:
    with pytest.raises(DataError, match=r"keep: nothing is left of 6 rows: 4 wrong; 2 below min_reward; loosen") as e:
        select("correct: true, min_reward: 2", *ANSWERS[1:], answer("9", "9", right=False))
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match=r"rows.jsonl:1: reward: not a number; it is missing; give the stage rewards"):
        select("best: 1", {"prompt": "p", "completion": "c"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: correct: not true or false; it is text \('yes'\)"):
        select("correct: true", {"prompt": "p", "completion": "c", "correct": "yes"})
    with pytest.raises(DataError, match="are of no known data set; name the reward"):
        select("rewards: [{kind: verifier}]", ANSWERS[0])
    assert texts(select("", {"prompt": "p", "completion": "c", "reward": "great", "solved": []})) == ["c"]


@pytest.mark.parametrize(
    ("stages", "error"),
    [
        (
            "  a: {kind: sample, tasks: {generate: arithmetic}}\n  b: {kind: select, data: '@a', correct: true}\n",
            "stages.b.data is @a, whose answers are not graded; give rewards here or there",
        ),
        (
            "  a: {kind: sample, tasks: {generate: arithmetic}}\n  b: {kind: select, data: '@aa'}\n",
            "stages.b.data is @aa, which is no earlier stage that makes rows; did you mean '@a'?",
        ),
        (
            "  b: {kind: select, data: '@a'}\n  a: {kind: sample, tasks: {generate: arithmetic}}\n",
            r"stages.b.data is @a, .*: it is made later, and .* \(a cycle\)",
        ),
        (
            "  b: {kind: select, data: r.jsonl, write: tasks}\n  c: {kind: sft, data: '@b'}\n",
            "stages.c.data is @b, which writes tasks, and sft learns from answers: give that one write: answers",
        ),
        (
            "  b: {kind: select, data: r.jsonl, rewards: [{kind: length, above_tokens: 3}]}\n",
            "stages.b.rewards: length counts tokens, which rows lack; put it in the sample stage",
        ),
        ("  b: {kind: select, data: r.jsonl, difficulty: [0, 2]}\n", "difficulty.1: must be at most 1, got 2"),
        ("  b: {kind: select, data: r.jsonl, corrct: true}\n", "corrct: unknown key; did you mean 'correct'"),
    ],
)
def test_what_does_not_fit_is_one_line(stages: str, error: str) -> None:
    Path("s.yaml").write_text(HEAD + stages)
    with pytest.raises(ConfigError, match=error) as caught:
        load_recipe("s.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("s.yaml:")


# ------------------------------------------------------------------------------------------------ sample

TEACHERS = """
def right(messages):
    left, second = messages[-1]["content"].split(" ")[0].split("+")
    return f"<answer>{int(left) + int(second)}</answer>"
def told(messages):
    return messages[-1]["content"].split()[-1] if "=" in messages[-1]["content"] else "?"
def silent(messages):
    raise RuntimeError
"""


def test_teachers_answer_and_are_graded() -> None:
    Path("t.py").write_text(TEACHERS)
    run(
        """
  ask:
    kind: sample
    tasks: {generate: arithmetic, count: 3, digits: 1}
    authors: [{script: "t.py:right"}, {script: "t.py:told"}]
    samples: 2
    rewards: [{kind: verifier}]
    hint: "= {answer}"
"""
    )
    rows = read("01-ask")
    assert len(rows) == 3 * 2 * 2 and all(row["correct"] for row in rows if row["author"] == "author 0")
    assert {row["author"] for row in rows} == {"author 0", "author 1"}
    told = [row for row in rows if row["author"] == "author 1"]
    assert all(row["completion"][0]["content"] == row["answer"] for row in told), "the hint was shown"
    assert all("=" not in row["prompt"][0]["content"] for row in rows), "and is not in the row"
    with pytest.raises(RewardError, match="most of chunk 1 of 1 could not be judged"):
        run(
            "  ask: {kind: sample, tasks: {generate: arithmetic, count: 2}, authors: [{script: 't.py:silent'}]}\n",
            "out=silent",
        )
    with pytest.raises(DataError, match="hint: 'anwer'; did you mean 'answer'"):
        run("  ask: {kind: sample, tasks: {generate: arithmetic, count: 2}, hint: '{anwer}'}\n", "out=typo")
