"""How golds and answers are read and compared: one example of each kind; the laws are in `laws/test_verifiers.py`."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_rewards import attempt, rubric, score, verdicts
from whet.envs.base import Grade, Task
from whet.envs.rewards.answers import last_boxed
from whet.envs.rewards.arithmetic import decimals, value
from whet.envs.rewards.function import FunctionReward
from whet.envs.rewards.math import MathReward
from whet.envs.rewards.notation import plain
from whet.envs.rewards.reader import read
from whet.envs.rewards.reading import final_words, statement, vote
from whet.envs.rewards.units import unit
from whet.envs.rewards.values import Choice, Date, Formula, Items, Matrix, Named, Number, Region, Relation, Text, YesNo
from whet.errors import DataError, RewardError
from whet.records import Message, Outcome, Reply


@pytest.fixture(scope="module")
def maths() -> Iterator[MathReward]:
    reward = MathReward(name="math", weight=1.0, gold="answer", deadline_s=5.0)
    yield reward
    reward.close()


# -------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "notation"),
    [
        ("\\dfrac12", "\\frac{1}{2}"), ("½", "\\frac{1}{2}"), ("√2", "\\sqrt{2}"), ("x²", "x^{2}"), ("x₁₀", "x_{10}"),
        ("\\left(1\\right)", "(1)"), ("$x\\leqslant 3.$", "x\\le 3"), ("**8**", "8"), ("`8`", "8"), ("2**3", "2^3"),
        ("11,\\!111", "11,111"), ("\\\\frac{1}{2}", "\\frac{1}{2}"), ("\x0crac{1}{2}", "\\frac{1}{2}"),
        ("12^{\\mathrm{th}} day", "12 day"), ("3<sup>x</sup>", "3^{x}"), ("\\textbf{(A)}", "\\text{(A)}"),
        ("\\begin{matrix}a\\\\b\\end{matrix}", "\\begin{matrix}a\\\\b\\end{matrix}"),
    ],
)  # fmt: skip
def test_spellings_of_the_same_become_one(text: str, notation: str) -> None:
    assert plain(text) == notation


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("1 1/2", Fraction(3, 2)), ("-1 1/2", Fraction(-3, 2)), ("918\\frac{1}{2}", Fraction(1837, 2)), ("-2^2", -4),
        ("0.\\overline{3}", Fraction(1, 3)), ("0.1(6)", Fraction(1, 6)), ("0.333\\ldots", Fraction(1, 3)),
        ("1.2e3", 1200), ("1.2\\cdot 10^{-3}", Fraction(3, 2500)), ("1,234,567", 1234567), ("1 000", 1000), ("5!", 120),
        ("2(3+4)/7", 2), ("50%", Fraction(1, 2)), ("3^{2^2}", 81), ("(2,251)", None), ("3 4", None), ("1,2", None),
        ("9^{9^9}", None), ("10000!", None), ("1/0", None), ("x", None), ("\\sqrt{4}", None), ("2^{1/2}", None),
        ("(" * 500 + "1" + ")" * 500, None),
    ],
)  # fmt: skip
def test_rational_arithmetic_is_exact_or_not_done(text: str, exact: Fraction | None) -> None:
    assert value(text) == exact


def test_places_after_the_point() -> None:
    assert [decimals(text) for text in ("0.120", "5", "1.5\\cdot 10^{-3}", "1.5e-3", "41.4%", "1/2")] == [
        3, None, 4, 4, 1, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("8 centimeters", Number), ("\\frac{\\sqrt{2}}{2} cm", Formula), ("B) 42", Choice), ("no", YesNo),
        ("January 2, 2025", Date), ("silent", Text), ("(1, 2)", Items), ("1 \\pm \\sqrt{2}", Items), ("x > 2", Region),
        ("[1, 2)", Region), ("2x + 3y = 4", Relation), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", Matrix),
        ("x = 3", Named),
        ("3 hours and 20 minutes", Number), ("20:3", Number), ("2:00 pm", Number), ("It is 3 apples", Text),
    ],
)  # fmt: skip
def test_each_kind_of_value_is_known(text: str, kind: type) -> None:
    assert isinstance(read(text), kind)


def test_units_have_a_factor_and_a_dimension() -> None:
    assert unit("km/h") == unit("kilometers per hour") and unit("kJ mol^{-1}") == unit("kJ/mol")
    metre, inch, area = unit("m"), unit("inches"), unit("square meters")
    assert metre and inch and area and metre.dimension == inch.dimension != area.dimension
    assert inch.factor == Fraction(254, 10000) and unit("apples") is None


@pytest.mark.parametrize(
    ("text", "words", "marked"),
    [
        ("<answer>8 centimeters</answer>", "8 centimeters", True),
        ("<answer>8", "8", True),
        ("First 3.\nSo x = 4\\sqrt{2}.\nHope this helps!", "So x = 4\\sqrt{2}.", False),
        ("\\boxed{1} and \\boxed{-2}", "1, -2", True),
        ("It cannot be.", "It cannot be.", False),
        ("2+3=<<2+3=5>>5\nSo 5.<|im_end|>\n7", "So 5.", False),
    ],
)
def test_the_words_of_the_answer_are_the_marked_ones_or_the_last_statement(text: str, words: str, marked: bool) -> None:
    assert final_words(text) == (words, marked)


def test_boxes_that_belong_together_are_one_answer() -> None:
    assert last_boxed("$x = \\boxed{2}$, $y = \\boxed{3}$") == "2, 3"
    assert last_boxed("\\boxed{2} is wrong. \\boxed{3}") == "3"
    assert last_boxed("\\boxed{\\boxed{4}}") == last_boxed("\\boxed{4} \\boxed{4}") == "4"
    assert last_boxed("\\boxed{\\boxed{1}, \\boxed{2}}") == "1, 2"
    assert last_boxed("$x = \\boxed{1}$, $y = \\boxed{1}$") == "1, 1"


@pytest.mark.parametrize(
    ("text", "question", "stated"),
    [
        ("20 - 3 = 17 apples", None, "17"),
        ("The total is $160. The first costs $100.", None, "160"),
        ("It takes 7 more weeks to save $60 at $4 a week.", "She saves $4 a week and wants $60.", "7"),
        ("The angle at $A$ is $\\frac{\\pi}{3}$", None, "\\frac{\\pi}{3}"),
        ("It cannot be said: $x + 1$", None, None),
        ("the square root of 5", None, None),
    ],
)
def test_prose_states_one_value(text: str, question: str | None, stated: str | None) -> None:
    found = statement(text, question, marked=True)
    assert (None if found is None else found.strip().removesuffix(" apples")) == stated


@pytest.mark.parametrize(
    "same",
    [
        ["<answer>85</answer>", "So it is 85.", "#### 85.0", "7 and 78 make 85", "$85"],
        ["\\boxed{\\frac{1}{2}}", "0.5", "The answer is 1/2."],
        ["B) Paris", "The answer is B"],
        ["The answer is Paris.", "paris"],
        ["", "<think>85", "</think>"],
    ],
)
def test_a_majority_counts_values_not_texts(same: list[str]) -> None:
    votes = {vote(text, "What is 7 + 78?") for text in same}
    assert len(votes) == 1 and votes != {vote("86", "")}
    assert (votes == {None}) == (same[0] == "")


# ------------------------------------------------------------------------------------------------ comparing


def test_marked_answers_may_have_words_and_units_around_them(maths: MathReward) -> None:
    texts = [
        "<answer>16 dollars</answer>", "The answer is 16 dollars.", "#### 16 dollars", 'so \\boxed{\\text{It is } 16}',
        "<answer>`$16`</answer>", "Thus she pays $16.00.", "<answer>B) 16</answer>", "**Answer:** 1600 cents",
    ]  # fmt: skip
    grades = maths.grade([attempt(text, answer="$16") for text in texts], step=0)
    assert [grade.value for grade in grades] == [1.0] * len(texts)


def test_a_part_of_the_answer_is_not_the_answer(maths: MathReward) -> None:
    pairs = [("4", "x = 4\\sqrt{2}"), ("5", "$x \\geq 5$"), ("6", "6√2"), ("2", "2 or 3"), ("31", "31.\\overline{6}")]
    assert verdicts(maths, pairs) == [0.0] * len(pairs)
    unmarked = [attempt(text, answer=gold) for gold, text in pairs]
    assert [grade.value for grade in maths.grade(unmarked, step=0)] == [0.0] * len(pairs)


def test_nothing_is_rounded_away(maths: MathReward) -> None:
    pairs = [("2^{-99}", "2^{-98}"), ("0.0000012", "0.0000008"), ("1/100!", "1/99!"), ("\\pi^{-40}", "\\pi^{-39}")]
    pairs += [("\\frac{1}{3}", "0.33"), ("\\sqrt{2}", "1.4"), ("\\frac{1}{8}", "0.12501"), ("5", "5.0001")]
    assert verdicts(maths, pairs) == [0.0] * len(pairs)
    near = [
        ("\\frac{600}{7}", "85.71"),
        ("\\sqrt{2}", "1.41421"),
        ("\\frac{2}{3}", "0.66666"),
        ("21.93", "21\\frac{13}{14}"),
    ]
    assert verdicts(maths, near) == [1.0] * len(near)


def test_algebra_decides_what_rules_do_not(maths: MathReward) -> None:
    right = [
        ("\\tan^2(y)+1", "\\sec^2(y)"), ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"), ("x < 1", "-x > -1"),
        ("f(x)=2x", "f(t)=2t"), ("1+2i", "i(2-i)"), ("90^\\circ", "\\frac{\\pi}{2}"), ("xy = 6", "\\frac{6}{x}"),
        ("1 \\le |z| \\le 2", "z \\in [-2,-1] \\cup [1,2]"), ("\\frac{(d-1)!d}{2}", "\\frac{d!}{2}"),
    ]  # fmt: skip
    wrong = [("x+1", "y+1"), ("x^2", "x^3"), ("7 = 11a+c", "11a+c"), ("x > 5", "x < 5"), ("\\sqrt{x^2}", "x")]
    assert verdicts(maths, right) == [1.0] * len(right)
    assert verdicts(maths, wrong) == [0.0] * len(wrong)


def test_a_tolerance_is_relative_and_asked_for() -> None:
    config = {"kind": "math", "tolerance": 0.01}
    values = [
        each.value for each in score(config, *(attempt(f"\\boxed{{{x}}}", answer="250") for x in (252, 253, "252.4")))
    ]
    assert values == [1.0, 0.0, 1.0]


def test_other_golds_than_mathematics_have_a_kind_of_their_own() -> None:
    made = rubric({"kind": "answer"})
    golds: list[tuple[Any, str, float]] = [
        (["NYC", "New York City"], "new york city", 1), (["NYC", "New York"], "Boston", 0),
        ("yes", "Yes, because 3 > 2", 1),
        ("2025-01-02", "2 January 2025", 1), ("2025-01-02", "2022", 0), ("C", "It is (C) because not (A)", 1),
        ("9.81 m/s^2", "981 cm/s^2", 1), ("silent", "listen", 0), (True, "true", 1),
    ]  # fmt: skip
    made.check([Task(id=str(n), messages=(), columns={"answer": gold}) for n, (gold, _, _) in enumerate(golds)])
    scores = made.score([attempt(f"<answer>{text}</answer>", answer=gold) for gold, text, _ in golds], step=0)
    made.close()
    assert [score.value for score in scores] == [value for _, _, value in golds]


@pytest.mark.parametrize(
    ("kind", "gold", "words"),
    [
        ("exact", ["1", "2"], "is a list"), ("exact", {"value": 1}, "is a dict"), ("exact", 145.0, "use kind: math"),
        ("math", "silent", "is text"), ("math", {"value": 1}, "is a dict"), ("math", ["a"], "is a list"),
        ("math", "\\frac{1}{2", "braces"), ("math", "?", "no letter and no digit"), ("answer", [], "empty list"),
        ("answer", "", "is empty"),
    ],
)  # fmt: skip
def test_a_gold_that_cannot_be_met_is_refused_with_its_row(kind: str, gold: object, words: str) -> None:
    made = rubric({"kind": kind})
    with pytest.raises(DataError, match=f"task row:7: gold answer.*{words}"):
        made.check([Task(id="row:7", messages=(), columns={"answer": gold})])
    made.close()


def test_agreement_with_labels_is_what_the_page_says(shared_data: Path, maths: MathReward) -> None:
    """All labelled pairs, as docs/verifiers.md counts them."""
    rows: dict[str, list[tuple[str, str, int]]] = {}
    for line in (shared_data / "verifier_peer_tests/dev/math_equiv_peer_tests.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind_of_case"] == "truth":
            rows.setdefault("peers", []).append((row["gold"], row["pred"], row["expected"]))
    for line in (shared_data / "hardverify_math/dev/hardverify_math_250.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault("hard", []).append((row["ground_truth"], row["fn_output"], 1))
    with gzip.open(shared_data / "verifier_real_pairs/dev/real_pred_pairs.jsonl.gz", "rt") as lines:
        real = [json.loads(line) for line in lines]
    rows["real"] = [(row["gold"], row["pred"], row["label"]) for row in real if row["label"] is not None]
    wrong = {}
    for name, some in rows.items():
        given = verdicts(maths, [(gold, pred) for gold, pred, _ in some])
        counts = Counter(zip([label for _, _, label in some], given, strict=True))
        wrong[name] = (counts[1, 0.0], counts[0, 1.0], counts[1, None] + counts[0, None])
    assert wrong["peers"][0] + wrong["peers"][1] <= 5, wrong
    assert wrong["real"][0] <= 12 and wrong["real"][1] <= 4, wrong
    assert wrong["hard"][0] <= 0.15 * len(rows["hard"]), wrong
    assert all(unscored == 0 for _, _, unscored in wrong.values()), wrong


# ------------------------------------------------------------------------------------------ users' functions


SIGNATURES = """
import numpy as np

class Reward:
    def __call__(self, completions, answer, **kwargs):
        return np.array([float(c[0]["content"] == a) for c, a in zip(completions, answer)], dtype=np.float32)

def reward_func(queries, prompts, labels):
    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts))
    right = [float(query[len(prompt):] == label) for query, prompt, label in zip(queries, prompts, labels)]
    return {"rewards": np.array(right), "scores": right, "extra_logs": {"length": [len(query) for query in queries]}}

def score_answer(answer, entry):
    return 1.0 if answer == entry["answer"] else 0.01

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": np.float64(solution_str == ground_truth), "acc": True}

def fragile(completions, **kwargs):
    return [-2.0 + len(c[0]["content"]) / (c[0]["content"] != "boom") for c in completions]

def nameless(x, y):
    return 0.0

def greedy(queries, prompts, labels, model):
    return 0.0

def column(completions, solution):
    return [1.0 for _ in completions]
"""


@pytest.fixture
def signatures(tmp_path: Path) -> Path:
    file = tmp_path / "signatures.py"
    file.write_text(SIGNATURES)
    return file


def graded(path: str, *texts: str) -> list[Grade]:
    reward = FunctionReward(name="f", weight=1.0, path=path, deadline_s=20.0)
    try:
        return reward.grade([attempt(text, answer="4") for text in texts], step=0)
    finally:
        reward.close()


@pytest.mark.parametrize("name", ["Reward", "reward_func", "score_answer", "compute_score"])
def test_signatures_of_other_libraries_run_unmodified(signatures: Path, name: str) -> None:
    right, wrong = graded(f"{signatures}:{name}", "4", "5")
    assert (right.value, wrong.value) == (1.0, 0.01 if name == "score_answer" else 0.0), (right, wrong)
    if name == "reward_func":
        assert dict(right.metrics) == {"length": 2.0}


@pytest.mark.parametrize(("name", "words"), [("nameless", "no signature of a reward"), ("greedy", "needs model")])
def test_a_wrong_signature_is_found_when_the_recipe_is_read(signatures: Path, name: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        rubric({"kind": "function", "path": f"{signatures}:{name}"})


def test_a_column_that_a_function_needs_is_missed_before_training(signatures: Path) -> None:
    made = rubric({"kind": "function", "path": f"{signatures}:column"})
    with pytest.raises(DataError, match=r"task t1.*'solution'"):
        made.check([attempt("", answer="4").task])
    made.close()


def test_one_exception_costs_one_answer(signatures: Path) -> None:
    """A batch of 100 in which one answer breaks the function: it alone is lost, with the lowest value and its name."""
    texts = ["x" * n for n in range(1, 100)]
    made = rubric({"kind": "function", "path": f"{signatures}:fragile"})
    scores = made.score([attempt(text) for text in [*texts, "boom"]], step=0)
    made.close()
    assert [score.value for score in scores[:-1]] == [n - 2.0 for n in range(1, 100)]
    assert (scores[-1].value, scores[-1].outcome) == (-1.0, Outcome.GRADER_GAVE_UP)
    assert "ZeroDivisionError" in scores[-1].note


# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [
        ("soft", "Well, <think>a</think> so <answer>1</answer>.", 1),
        ("soft", "<answer>1</answer><think>a</think>", 0),
        ("think", "<think>a</think>b", 1), ("think", "a</think>b", 0),
        ("think", "<think>a<think>b</think></think>c", 0),
        ("open_r1", "<think>\na\n</think>\n<answer>\n1\n</answer>", 1),
        ("open_r1", "<think>a</think><answer>1</answer>", 0),
        ("tags", "<think>\na\n</think>\n<answer>\n1\n</answer>", 1), ("tags", "<think>\na\n</think>\n1", 0.5),
        ("tags", "", 0),
    ],
)  # fmt: skip
def test_layouts(form: str, text: str, value: float) -> None:
    assert score({"kind": "format", "form": form}, attempt(text))[0].value == value


def test_peers_agree_on_the_layout_of_thinking(shared_data: Path) -> None:
    file = shared_data / "verifier_peer_tests/dev/extraction_and_reward_peer_cases.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["fn"] == "think_format_reward"]
    given = score({"kind": "format", "form": "think"}, *(attempt(row["input"]) for row in rows))
    assert [each.value for each in given] == [row["expected"] for row in rows] and rows


@pytest.mark.parametrize(
    ("script", "text", "value"),
    [
        ("LATIN", "two words 12 + x", 1),
        ("LATIN", "one слово", 0.5),
        ("CJK", "我们 know", 2 / 3),
        ("LATIN", "12 + 3", 0),
    ],
)
def test_language_consistency_is_a_share_of_words(script: str, text: str, value: float) -> None:
    given = score({"kind": "language", "script": script}, attempt(text))[0].value
    assert given == pytest.approx(value)


# ------------------------------------------------------------------------------------ OpenAI's grader objects

CHECK = {"type": "string_check", "input": "{{ sample.output_text }}", "reference": "{{item.answer}}", "operation": "eq"}
ALIKE = {**CHECK, "type": "text_similarity", "evaluation_metric": "rouge_1"}
del ALIKE["operation"]
SOURCE = """
def grade(sample, item):
    return float(len(sample["output_text"]) <= item["limit"]) / (sample["output_text"] != "boom")
"""
PYTHON = {"type": "python", "source": SOURCE}
MULTI = {"type": "multi", "graders": {"a": CHECK, "b": PYTHON}, "calculate_output": "max(a, 0.5) * b ^ 2 - 0.25"}


SCORE = {
    "type": "score_model",
    "name": "close",
    "model": "gpt-4o-2024-08-06",
    "range": [0, 10],
    "input": [
        {"role": "developer", "content": "You compare."},
        {"role": "user", "content": {"type": "input_text", "text": "{{sample.output_text}} | {{item.answer}}"}},
    ],
}


@dataclass
class Scorer:
    """A model that gives 10 where both sides are the same, says what it is told to, and notes what it is asked."""

    asked: list[list[tuple[str, str]]] = field(default_factory=list)

    def chat(self, conversations: Any, *, max_tokens: int, readable: Any = None) -> list[Reply]:
        self.asked += [[(message.role, message.content) for message in each] for each in conversations]
        return [self.reply(each[-1].content) for each in conversations]

    def reply(self, said: str) -> Reply:
        given, _, gold = said.partition("\n")[0].partition(" | ")
        if given == "away":
            return Reply(message=None, failure="HTTP 503")
        found = f'{{"result": {10 if given == gold else 0}}}'
        value = {"silent": "I cannot say.", "more": '{"result": 11}'}.get(given, found)
        return Reply(message=Message(role="assistant", content=f'One has "result": 3. {value}'))

    def close(self) -> None:
        pass


def test_a_score_model_is_asked_and_its_silence_says_nothing_of_the_answer() -> None:
    scorer: Any = Scorer()
    models: Any = SimpleNamespace(chat=lambda config: scorer)
    multi = {"type": "multi", "graders": {"m": SCORE, "c": CHECK}, "calculate_output": "m / 10 + c"}
    for grader, best in ((SCORE, 10), (multi, 2)):
        made = rubric({"kind": "grader", "grader": grader, "model": {"script": "judge.py:f"}}, models=models)
        made.check([attempt("", answer="sky").task])
        texts = ("sky", "sea", "silent", "more", "away")
        right, wrong, *lost = made.score([attempt(text, answer="sky") for text in texts], step=1)
        made.close()
        assert (right.value, wrong.value) == (best, 0)
        assert [(each.value, each.outcome) for each in lost] == [(None, Outcome.GRADER_ERROR)] * 3
    (system, user) = scorer.asked[0]
    assert system == ("system", "You compare.")
    assert user[1].startswith("sky | sky\n") and '{"result": X}, where X is a number from 0 to 10' in user[1]
    with pytest.raises(DataError, match=r"item\.answer"):
        made.check([attempt("").task])


@pytest.mark.parametrize(
    ("grader", "text", "value"),
    [
        (CHECK, "blue sky", 1), (CHECK, "Blue sky", 0), ({**CHECK, "operation": "ne"}, "red", 1),
        ({**CHECK, "operation": "like"}, "the blue sky!", 1), ({**CHECK, "operation": "ilike"}, "the BLUE SKY!", 1),
        (ALIKE, "blue sea", 0.5), ({**ALIKE, "evaluation_metric": "rouge_l"}, "sky blue", 0.5),
        ({**ALIKE, "evaluation_metric": "fuzzy_match"}, "blue sky", 1),
        ({**ALIKE, "evaluation_metric": "gleu"}, "green", 0),
        (PYTHON, "12345678901", 0), (PYTHON, "1234567890", 1), (MULTI, "blue sky", 0.75), (MULTI, "red", 0.25),
    ],
)  # fmt: skip
def test_openai_graders_run_as_their_json_has_them(grader: dict[str, Any], text: str, value: float) -> None:
    given = score({"kind": "grader", "grader": grader}, attempt(text, answer="blue sky", limit=10))[0]
    assert given.value == pytest.approx(value), given


def test_an_answer_that_breaks_a_python_grader_is_scored_lowest() -> None:
    config = {"kind": "grader", "grader": PYTHON}
    good, bad = score(config, *(attempt(text, answer="x", limit=10) for text in ("fine", "boom")))
    assert (good.value, bad.value, bad.outcome) == (1.0, 0.0, Outcome.GRADER_GAVE_UP)


def test_a_grader_that_cannot_work_is_refused_before_training() -> None:
    made = rubric({"kind": "grader", "grader": {**CHECK, "reference": "{{item.gold}}"}})
    with pytest.raises(DataError, match=r"task t1.*item\.gold"):
        made.check([attempt("", answer="x").task])
    for wrong, words in [
        ({**MULTI, "calculate_output": "a + c"}, "names c"),
        ({**MULTI, "calculate_output": "__import__('os')"}, "may hold numbers"),
        ({"type": "label_model"}, "score_model"),
        (SCORE, "model says who is asked"),
    ]:
        with pytest.raises(ValueError, match=words):
            rubric({"kind": "grader", "grader": wrong})
