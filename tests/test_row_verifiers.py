"""Rows of published data sets: recognised by their columns and checked by the verifier that they name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

from whet.config import DataConfig
from whet.config.loading import load_recipe
from whet.config.rewards import AnswerReward, InstructionsReward, VerifierReward
from whet.config.shaping import FormatReward
from whet.data.formats import load_tasks
from whet.data.known import TASKS
from whet.envs.base import Attempt, Task
from whet.envs.rewards.build import build_rubric
from whet.envs.rewards.rows import VERIFIERS, RowVerifier
from whet.errors import DataError, RewardError
from whet.pipeline.load_data import tasks
from whet.records import Message, Reply

KNIGHTS = {
    "quiz": "Ann says that Bo lies. Bo says that both tell the truth. Who is what?",
    "names": ["Ann", "Bo"],
    "solution": [True, False],
    "statements": "(('lying', 1), ('and', ('telling-truth', 0), ('telling-truth', 1)))",
}
ZEBRA = {"puzzle": "Two houses ...", "solution": {"header": ["House", "Name"], "rows": [["1", "Ann"], ["2", "Bo"]]}}
SUDOKU = {"puzzle": "1234341221434300", "solution": "1234341221434321"}
MANY = {"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
ARC = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4, 0]]}]}
RULES = {"prompt": "p?", "variables": ["p", "q"], "constraints": ["p -> q", "p"]}
ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("math", {"question": "2+2?", "answer": "We add: 2+2=<<2+2=4>>4\n#### 4"}, "so 4", "so 5"),
    ("answer", {"question": "Who?", "answer": "Ann Lee"}, "<answer>ann lee</answer>", "Ann"),
    ("answer", {"problem": "x?", "answer": "\\frac{1}{2}", "level": 1}, "\\boxed{0.5}", "\\boxed{2}"),
    ("answer", {"problem": "x?", "solution": "Thus \\boxed{7}."}, "7", "8"),
    ("answer", {"question": "x?", "ground_truth": "12.5\\%"}, "12.5%", "12%"),
    ("math", {"Body": "Ann has 3.", "Question": "Twice?", "Answer": 6.0}, "6", "3"),
    ("math", {"input": "1+1", "target": 2.0, "idx": 0}, "2", "1"),
    ("answer", {"question": "2+2?", "options": ["A)3", "B)4"], "correct": "B"}, "The answer is B.", "A) 4"),
    ("answer", {"question": "2+2?", "choices": ["3", "4"], "answer": 1}, "4", "3"),
    ("answer", {"question": "2+2?", "choices": ["3", "4"], "answer": "B", "subject": "s"}, "(B)", "A"),
    ("answer", MANY, "B) 4", "A"),
    ("answer", {"QUESTION": "Is it?", "CONTEXTS": ["c"], "final_decision": "maybe"}, "maybe", "yes"),
    ("answer", {"premises": ["p"], "conclusion": "c", "label": "Uncertain"}, "It is uncertain.", "True"),
    ("answer", {"problem_text": "p?", "answer_number": "2.5", "unit": "m"}, "250 cm", "2.5 s"),
    ("answer", {"Question": "even?", "Answer": True, "Answer_type": "bool"}, "true", "false"),
    ("exact", {"task": "dyck", "input": "[ (", "target": ") ]"}, ") ]", ") )"),
    ("answer", {"task": "snarks", "input": "which?", "target": "(A)"}, "A", "B"),
    ("knights_knaves", KNIGHTS, "Ann is a knight and Bo is a knave", "Both are knights"),
    ("countdown", {"nums": [3, 4], "target": 12}, "3*4", "3+4"),
    ("countdown", {"Puzzles": "4 6", "Rank": "1"}, "<answer>4 * 6 = 24</answer>", "24"),
    ("zebra", ZEBRA, '{"House 1": {"Name": "Ann"}, "House 2": {"Name": "Bo"}}', "House 1: Bo\nHouse 2: Ann"),
    ("sudoku", SUDOKU, "1234 3412 2143 4321", "1234 3412 2143 4312"),
    ("grid", ARC, "4 0", "4"),
    ("constraints", RULES, "p = true, q = true", "p = true"),
    ("instructions", {"prompt": "p?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "no", "no, no"),
]  # fmt: skip


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def attempt(task: Task, text: str) -> Attempt:
    said = (Message(role="assistant", content=text),)
    return Attempt(task=task, messages=said, completion_tokens=(), truncated=False, max_tokens=1)


@pytest.mark.parametrize(
    ("verifier", "row", "right", "wrong"), ROWS, ids=[f"{n}-{row[0]}" for n, row in enumerate(ROWS)]
)
def test_rows_are_known_by_their_columns(
    verifier: str, row: dict[str, Any], right: str, wrong: str, tmp_path: Path
) -> None:
    (task,), _ = tasks(DataConfig(path=write(tmp_path, row)))
    rubric = build_rubric([VerifierReward(), FormatReward(kind="format", weight=0.1)])
    try:
        rubric.check([task])
        assert task.columns["verifier"] == verifier and task.messages[-1].content.strip()
        scores = rubric.score([attempt(task, text) for text in (right, wrong, "")], step=0)
        assert [(score.parts["verifier"], score.parts["format"]) for score in scores] == [(1, 0), (0, 0), (0, 0)]
        assert [score.correct for score in scores] == [True, False, False]
    finally:
        rubric.close()


def test_every_shape_and_every_verifier_has_an_example() -> None:
    assert {row[0] for row in ROWS} == set(VERIFIERS) - {"reasoning_gym"}
    assert len(TASKS) == 23 and set(get_args(get_args(VerifierReward.model_fields["verifier"].annotation)[0])) == set(
        VERIFIERS
    )


def test_rows_of_several_kinds_are_checked_each_by_its_own(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "verifier": "countdown", "numbers": [2, 3], "target": 6}, KNIGHTS, ROWS[0][1]]
    listed, _ = tasks(DataConfig(path=write(tmp_path, *rows)))
    reward = RowVerifier(name="v", weight=1.0)
    reward.check(listed)
    said = ["3*2", "Ann is a knight, Bo is a knave", "4"]
    mixed = [attempt(task, text) for text in said for task in listed]
    assert [grade.value for grade in reward.grade(mixed, step=0)] == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    reward.close()


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "p", "gold": "4"}, r"its columns \(gold\) are of no known data set; name the reward, for example"),
        ({"prompt": "p", "verifier": "countdow"}, "'countdow' is not known; did you mean 'countdown'"),
        ({"prompt": "p", "verifier": "countdown", "target": 3}, "no column 'nums'"),
        ({"nums": [3, 4], "target": 12, "solution": "3+4"}, r"its answer '3\+4' breaks the puzzle's own rules"),
        ({**KNIGHTS, "solution": [True, True]}, "breaks the puzzle's own rules"),
        ({**KNIGHTS, "statements": "(('lying', 5), ('lying', 0))"}, "no such puzzle: .* is no formula over 0, 1"),
        ({**KNIGHTS, "statements": "(("}, "no such puzzle"),
        ({"puzzle": "12", "solution": "12"}, "no such puzzle: a puzzle has 16 or 81 cells"),
        ({"prompt": "p", "variables": ["p"], "constraints": ["q"]}, "is no formula over"),
        ({"question": "q?", "answer": "#### "}, "is empty"),
    ],
)
def test_a_row_that_cannot_be_checked_is_named_before_training(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    (task,), _ = tasks(DataConfig(path=write(tmp_path, row)))
    reward = RowVerifier(name="v", weight=1.0)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{complaint}"):
        reward.check([task])
    reward.close()


@pytest.mark.parametrize(
    "row",
    [
        {**KNIGHTS, "solution": [True]},
        {"question": "q", "answer": "x" * 500},
        {"question": "q", "options": ["A)3"], "correct": "F"},
        {**ZEBRA, "solution": {"header": ["House"], "rows": [["1", "Ann"]]}},
        {"Puzzles": "4 six", "Rank": "1"},
    ],
)
def test_a_damaged_row_of_a_known_data_set_is_no_traceback(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: looks like a task for '\w+' and is none; .*map data.columns"):
        load_tasks(DataConfig(path=write(tmp_path, row)))


def test_columns_of_the_recipe_and_a_verifier_by_name(tmp_path: Path) -> None:
    row = {"numbers": [3, 4], "target": 12}
    config = DataConfig(path=write(tmp_path, row), columns={"prompt": "Make {target} of them."})
    (task,), _ = tasks(config)
    reward = RowVerifier(name="v", weight=1.0, verifier="countdown")
    reward.check([task])
    assert [grade.value for grade in reward.grade([attempt(task, "3*4")], step=0)] == [1]


def test_a_recipe_without_rewards_checks_its_tasks_themselves(tmp_path: Path) -> None:
    path, rows = tmp_path / "r.yaml", write(tmp_path, ROWS[0][1])
    path.write_text(
        f"name: r\nmodel: whet:tiny\nstages:\n  rl: {{kind: rl, train: {{steps: 1}}, tasks: {{path: {rows}}}}}\n"
        "  eval: {kind: eval, models: {m: '@rl'}, tasks: {generate: arithmetic}}\n"
    )
    stages = load_recipe(path).recipe.stages.values()
    assert [stage.rewards for stage in stages] == [[VerifierReward()], [VerifierReward()]]  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------- rows of a program


def program(folder: Path, text: str) -> Path:
    path = folder / "rows.py"
    path.write_text(f"import json, sys\n{text}\n")
    return path


ENDLESS = "n = 0\nwhile True:\n    n += 1\n    print(json.dumps({'question': f'{sys.argv[1]} {n}', 'answer': n}))"


def test_a_program_prints_rows_and_is_ended_where_no_more_are_wanted(tmp_path: Path) -> None:
    path = program(tmp_path, ENDLESS)
    for split in ("train", "test"):
        listed, _ = tasks(DataConfig(path=str(path), split=split, limit=3))
        assert [task.messages[0].content for task in listed] == [f"{split} {n}" for n in (1, 2, 3)]
        assert listed[2].id == f"{path}:3"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "print(json.dumps({'question': 'q', 'answer': 1}))\nraise ValueError('no more')",
            "exit code 1: ValueError: no more",
        ),
        ("print('hello')", r"rows.py:1: not valid JSON"),
        ("", "it has no rows"),
    ],
)
def test_a_program_that_fails_is_said(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=complaint):
        tasks(DataConfig(path=str(program(tmp_path, text))))


# ------------------------------------------------------------------------------- the judge of equivalence


class Chat:
    """Says what a rule says of a question; None is silence."""

    identity = "rule"

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, list[str]()

    def chat(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int, readable: object = None
    ) -> list[Reply]:
        texts = [conversation[-1].content for conversation in conversations]
        self.asked += texts
        verdicts = [self.rule(text) for text in texts]
        return [
            Reply(
                message=word and Message(role="assistant", content=f"Verdict: {word}"), failure="" if word else "silent"
            )
            for word in verdicts
        ]

    def close(self) -> None:
        """Nothing to end."""


class Models:
    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def chat(self, config: object) -> Chat:
        return self._chat


def graded(rule: Any, gold: object, *texts: str) -> tuple[list[Any], Chat]:
    chat = Chat(rule)
    config = AnswerReward.model_validate({"kind": "answer", "judge": {"model": {"script": "x.py:f"}}})
    rubric = build_rubric([config], models=Models(chat))  # type: ignore[arg-type]
    task = Task(id="t", messages=(Message(role="user", content="Who ran?"),), columns={"answer": gold})
    scores = rubric.score([attempt(task, f"<answer>{text}</answer>") for text in texts], step=0)
    rubric.close()
    return scores, chat


def test_the_judge_decides_only_what_rules_do_not() -> None:
    scores, chat = graded(lambda text: "Yes", "the quick fox", "The quick fox", "a fast fox")
    assert [score.value for score in scores] == [1, 1] and len(chat.asked) == 2, "one answer, in both orders"
    assert "the quick fox" in chat.asked[0] and chat.asked[0] != chat.asked[1]
    assert [score.parts["answer/judged"] for score in scores] == [0, 1]
    assert [score.parts["answer/judged_right"] for score in scores] == [0, 1]
    for gold in (12, "3 m", "B) 4", "yes", "2025-01-02", "x^2+1"):
        scores, chat = graded(lambda text: "Yes", gold, "some fox")
        assert [score.value for score in scores] == [0] and not chat.asked, gold


def test_what_such_a_judge_does_not_look_at_is_refused() -> None:
    with pytest.raises(ValueError, match="scale is of judges of how good an answer is"):
        AnswerReward.model_validate({"kind": "answer", "judge": {"model": {"script": "x.py:f"}, "scale": "yes_no"}})


def test_both_orders_must_agree_and_silence_is_no_verdict() -> None:
    def first_is_gold(text: str) -> str:
        return "Yes" if text.index("quick fox") < text.index("owl") else "No"

    assert graded(first_is_gold, "the quick fox", "an owl")[0][0].value == 0
    (score,), _ = graded(lambda text: None, "the quick fox", "an owl")
    assert score.value is None and "silent" in score.note
    several = ["the quick fox", "hound"]
    assert graded(lambda text: "Yes" if "hound" in text else "No", several, "a dog")[0][0].value == 1
    assert graded(lambda text: "Yes" if "hound" in text else None, several, "a dog")[0][0].value == 1


# --------------------------------------------------------------------------------------------- real rows


def test_instructions_may_be_shared(tmp_path: Path) -> None:
    row = {**ROWS[-1][1], "instruction_id_list": ["punctuation:no_comma", "format:no_whitespace"], "kwargs": [{}, {}]}
    (task,), _ = tasks(DataConfig(path=write(tmp_path, row)))
    rubric = build_rubric([InstructionsReward(kind="instructions", share=True)])
    assert [score.value for score in rubric.score([attempt(task, "a b")], step=0)] == [0.5]


@pytest.mark.parametrize(
    ("pattern", "unusable"),
    [("knights_knaves/dev/3ppl_test*", 0), ("countdown/dev/*", 0), ("game24/dev/*", 0), ("folio/dev/*val*", 0),
     ("aqua/dev/*", 0), ("svamp/dev/*", 0), ("math/dev/math500*", 0), ("aime/dev/aime_2024*", 0),
     ("ifbench/dev/IFBench*", 5)],
)  # fmt: skip
def test_the_golds_of_real_rows_pass_their_own_verifiers(pattern: str, unusable: int, shared_data: Path) -> None:
    (path,) = shared_data.glob(pattern)
    listed, _ = tasks(DataConfig(path=str(path), limit=300))
    reward = RowVerifier(name="v", weight=1.0)
    refused = []
    for task in listed:
        try:
            reward.check([task])
        except DataError as error:
            refused.append(str(error))
    reward.close()
    assert len(refused) == unusable, refused[:2]


def test_reasoning_gym_scores_its_own_rows(tmp_path: Path) -> None:
    entry = {"question": "q", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}
    (task,), _ = tasks(DataConfig(path=write(tmp_path, entry)))
    reward = RowVerifier(name="v", weight=1.0)
    if find_spec("reasoning_gym") is None:
        with pytest.raises(RewardError, match=r"not installed; pip install 'whet\[envs\]'"):
            reward.check([task])
        pytest.skip("reasoning-gym is not installed")
    reward.check([task])
    assert [
        grade.value for grade in reward.grade([attempt(task, text) for text in ("<answer>7</answer>", "8")], step=0)
    ] == [1, 0]
    reward.close()
