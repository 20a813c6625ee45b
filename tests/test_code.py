"""Laws of the code reward: right programs score, and nothing else does, whatever it does to its process.

The rows of files are real; they are looked for where the other tests look for them.
"""

from __future__ import annotations

import ast
import json
import pickle
import random
import zlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.attacks import FORGERIES, HONEST
from whet.config import DataConfig, GeneratedConfig
from whet.config.rewards import CodeRewardConfig
from whet.data.base import Origin, Row
from whet.data.formats import load_conversations, load_tasks
from whet.data.known import TURNS, unfold
from whet.envs.base import Attempt, Grade, Task
from whet.envs.families import family
from whet.envs.rewards.build import build_rubric
from whet.envs.rewards.code import CodeReward, _fits, expression, program_of, same, same_output
from whet.envs.rewards.code_side import pack, unpack
from whet.envs.rewards.code_tests import suite_of
from whet.errors import DataError, SandboxError
from whet.records import Message, Outcome
from whet.sandbox import base
from whet.sandbox.base import Limits, Status
from whet.sandbox.programs import LocalSandbox

LIMITS = Limits(deadline_s=1.0, memory_mb=256, output_kb=1024)
PATIENT = Limits(deadline_s=30.0, memory_mb=512, output_kb=4096)
ASSERTS = {"test_list": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add(10, -9) == 1"]}
SCRIPT = {
    "test_list": ["assert abs(add(2, 3) - 5) < 1e-9", "assert add(-1, 1) in {0}", "assert not add(10, -9) != 1"],
}
CHECK = {
    "entry_point": "add",
    "prefix": "import math\n",
    "test": "def check(candidate):\n for a in range(3):\n  assert candidate(a, 4) == a + 4\n assert candidate(1, 0)",
}
PAIRS = {"tests": {"fn_name": "add", "inputs": [[2, 3], [-1, 1], [10, -9]], "outputs": [5, 0, 1]}}
PLUS = {
    "entry_point": "add",
    "prefix": 'def add(a, b):\n    """Add."""\n',
    "canonical_solution": "    return a + b\n",
    "base_input": [[2, 3]],
    "plus_input": "[[-1, 1], [10, -9], [0, 1]]",
    "atol": 0,
}
FORMS = {"plus": PLUS, "calls": ASSERTS, "scripts": SCRIPT, "check": CHECK, "pairs": PAIRS}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    try:
        made = LocalSandbox("auto", workers=2)
    except SandboxError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def graded(
    sandbox: base.Sandbox, rows: Sequence[tuple[dict[str, Any], str]], limits: Limits = LIMITS, **options: Any
) -> list[Grade]:
    reward = CodeReward(name="code", weight=1.0, sandbox=sandbox, limits=limits, **options)
    return reward.grade([attempt(columns, said, f"row:{i}") for i, (columns, said) in enumerate(rows)], step=1)


def attempt(columns: dict[str, Any], said: str, name: str = "row:1") -> Attempt:
    return Attempt(
        task=Task(id=name, messages=(Message(role="user", content="?"),), columns=columns),
        messages=(Message(role="assistant", content=said),),
        completion_tokens=(),
        truncated=False,
        max_tokens=1,
    )


@pytest.mark.parametrize("form", FORMS)
def test_honest_programs_score_and_forgeries_do_not(sandbox: LocalSandbox, form: str) -> None:
    honest = graded(sandbox, [(FORMS[form], program) for program in HONEST.values()], PATIENT)
    assert dict(zip(HONEST, (grade.value for grade in honest), strict=True)) == dict.fromkeys(HONEST, 1.0), honest
    forged = graded(sandbox, [(FORMS[form], program) for program in FORGERIES.values()])
    # The tests' own process compares with Python's ==, where True is 1.
    weaker = {"True for one": 1.0} if form in ("scripts", "check") else {}
    given = dict(zip(FORGERIES, (grade.value for grade in forged), strict=True))
    assert given == {**dict.fromkeys(FORGERIES, 0.0), **weaker}
    assert not any(grade.failure for grade in forged)


def test_evalplus_compares_floats_within_its_tolerance(sandbox: LocalSandbox) -> None:
    exact, coarse = ({**PLUS, "base_input": [[0.1, 0.2]], "plus_input": [], "atol": atol} for atol in (0, 0.01))
    off = "def add(a, b): return a + b + 0.001"
    near = "def add(a, b): return a + b + 1e-9"
    given = graded(sandbox, [(exact, off), (exact, near), (coarse, off)], PATIENT)
    assert [grade.value for grade in given] == [0.0, 1.0, 1.0]
    (row,) = unfold(
        Row(origin=Origin(source="plus.jsonl", line=1), values={**PLUS, "prompt": PLUS["prefix"], "task_id": "x/1"}),
        DataConfig(path="plus.jsonl"),
        TURNS,
    )
    assert row.values["completion"] == '```python\ndef add(a, b):\n    """Add."""\n    return a + b\n```'
    assert graded(sandbox, [(row.values, row.values["completion"])], PATIENT)[0].value == 1


def test_a_helper_of_the_tests_sees_the_expected_value_and_a_solution_does_not(sandbox: LocalSandbox) -> None:
    columns = {
        "test_setup_code": "def near(given, wanted): return abs(given - wanted) < 1e-6",
        "test_list": ["assert near(add(1, 2), 3) == True"],
    }
    forged = "def near(given, wanted): return True\ndef add(a, b): return 0"
    given = graded(sandbox, [(columns, forged), (columns, HONEST["plain"])], PATIENT)
    assert [grade.value for grade in given] == [0.0, 1.0]


def test_an_expression_that_holds_the_function_is_no_value_of_it(sandbox: LocalSandbox) -> None:
    columns = {"code": "def f(x):\n    return x + [1]", "input": "[2]", "output": "[2, 1]"}
    said = ["[2, 1]", "f([2]) == [2, 1]", "(lambda x: x + [1])([2])", "[2] + [1]", "f([2])", "exec('1') or [2, 1]"]
    given = graded(sandbox, [(columns, each) for each in said], PATIENT)
    assert [grade.value for grade in given] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_solution_does_not_end_the_loop_of_its_tests(sandbox: LocalSandbox) -> None:
    mapped = {"test_list": ["assert all(map(lambda a: add(a, 1) == a + 1, range(3)))"]}
    loop = "for s, a in zip(map(lambda a: candidate(a, 1), (1, 2)), (2, 3)): assert s == a"
    zipped = {**CHECK, "test": f"def check(candidate):\n {loop}"}
    forged = [f"def add(a, b): raise {kind}" for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit")]
    for columns in (mapped, zipped):
        given = graded(sandbox, [(columns, said) for said in [*forged, HONEST["plain"]]], PATIENT)
        assert [grade.value for grade in given] == [0.0, 0.0, 0.0, 1.0]


STREAMS = {"input_output": json.dumps({"inputs": ["2 3\n", "4\n5\n"], "outputs": ["5\n", "9"]})}
ADDS = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"


def test_programs_that_read_and_print(sandbox: LocalSandbox) -> None:
    answers = {
        ADDS: 1.0,
        f"{ADDS}\nprint()": 1.0,
        f"{ADDS}\nimport os; os._exit(0)": 0.0,  # what it printed was never flushed
        f"{ADDS}\nraise SystemExit(1)": 0.0,
        "print(*range(100))": 0.0,
        "print(5)": 0.0,
        "import sys; sys.exit(0)": 0.0,
        "while True: pass": 0.0,
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'5')\n except OSError: pass": 0.0,
    }
    given = graded(sandbox, [(STREAMS, program) for program in answers])
    assert [grade.value for grade in given] == list(answers.values())
    partly = graded(sandbox, [(STREAMS, "print(5)"), (STREAMS, ADDS)], partial=True)
    assert [grade.value for grade in partly] == [0.5, 1.0]


def test_what_a_program_did_is_counted_under_its_name(sandbox: LocalSandbox) -> None:
    ends = {
        "timeout": "def add(a, b):\n while True: pass",
        "memory": "x = bytearray(1 << 40)",
        "output": "while True: print('x' * 100000)",
        "signalled": "import ctypes; ctypes.string_at(0)",
    }
    given = graded(sandbox, [(ASSERTS, program) for program in ends.values()], Limits(deadline_s=5, memory_mb=256))
    assert given[1].value == 0 and given[1].note == "MemoryError in line 1"
    for name, grade in zip(ends, given, strict=True):
        assert grade.value == 0 and not grade.gave_up
        if name != "memory":  # which the harness survives, and answers for
            assert [key for key, value in grade.metrics.items() if value] == [name], grade


def test_a_part_of_the_tests_may_earn_a_part(sandbox: LocalSandbox) -> None:
    mostly = "def add(a, b): return a + b if a != 10 else None"
    for form, share in (("calls", 2 / 3), ("scripts", 2 / 3), ("pairs", 2 / 3), ("check", 0.0)):
        columns = FORMS[form] if form != "check" else {**CHECK, "test": CHECK["test"].replace("(3)", "(11)")}
        assert graded(sandbox, [(columns, mostly)], PATIENT, partial=True)[0].value == pytest.approx(share)
        assert graded(sandbox, [(columns, mostly)], PATIENT)[0].value == 0


class _Broken:
    """A sandbox whose every program ends in one way."""

    def __init__(self, status: Status) -> None:
        self.status, self.protections = status, dict[str, bool]()

    def describe(self) -> str:
        return "broken"

    async def run(self, *given: Any, **named: Any) -> base.ProgramOutcome:
        return base.ProgramOutcome(status=self.status, note="no room")

    async def open(self, *given: Any, **named: Any) -> Any:
        raise SandboxError("no sessions")

    def close(self) -> None:
        pass


def test_the_machinerys_fault_is_unscored_and_the_programs_is_not() -> None:
    lost, broke = (graded(_Broken(status), [(ASSERTS, "x")])[0] for status in (Status.MACHINERY, Status.BROKE))
    assert lost.value is None and lost.failure == "the sandbox failed: no room"
    assert (broke.value, broke.gave_up, broke.metrics["broke"]) == (0.0, True, 1.0)


@pytest.mark.parametrize(
    ("wanted", "given", "equal"),
    [
        (1, 1.0, True), (1, True, False), (0, False, False), (True, True, True), ([1], (1,), False), ("1", 1, False),
        ((1, [2]), (1, [2]), True), ({1, 2.0}, {1.0, 2}, True), ({1}, {True}, False), ({1: [2]}, {1: [2]}, True),
        ({1: 2}, {1: 3}, False), ({1: 2}, {True: 2}, False), (None, 0, False), (float("nan"), float("nan"), False),
        (float("inf"), float("inf"), True), (0.1 + 0.2, 0.3, False), (10**30, 10**30, True), (b"a", "a", False),
        (b"a", bytearray(b"a"), True), (1j, 1j, True), ({1}, frozenset({1}), False), ([], (), False), ("", None, False),
    ],
)  # fmt: skip
def test_values_are_equal_with_their_types(wanted: Any, given: Any, equal: bool) -> None:
    assert same(pack(wanted), json.loads(json.dumps(pack(given)))) is equal
    if wanted == wanted:
        assert unpack(pack(wanted), {}) == wanted


def test_numpys_scalars_are_plain_and_its_arrays_are_not() -> None:
    for given, plain in ((np.int64(5), 5), (np.float32(0.5), 0.5), (np.bool_(True), True), ([np.int8(1)], [1])):
        assert same(pack(plain), json.loads(json.dumps(pack(given))))
    assert not same(pack(5), pack(np.bool_(True))) and not same(pack(1), pack(np.array([1])))


def test_tolerance_has_a_place_only_where_it_is_asked_for() -> None:
    assert not same(0.3, 0.1 + 0.2) and same(0.3, 0.1 + 0.2, 1e-9) and not same("0.3", "0.30", 1e-9)
    assert not same_output("0.3", "0.30000001") and same_output("a 0.3", "a  0.30000001\n", 1e-6)
    assert same(pack([1, 2]), pack((1, 2)), tuples=False) and not same(pack([1, 2]), pack({1, 2}), tuples=False)


def test_an_object_is_plain_data_of_the_tests_own_classes(sandbox: LocalSandbox) -> None:
    """LeetCode's trees and lists pass between the processes; a class that the tests do not define is refused."""
    space: dict[str, Any] = {"__name__": "solution"}
    exec("class Node:\n def __init__(self, v, n=None): self.v, self.n = v, n", space)
    node = unpack(json.loads(json.dumps(pack(space["Node"](1, space["Node"](2))))), space)
    assert (node.v, node.n.v, node.n.n) == (1, 2, None)
    for forged in ({"object": ["Popen", {"dict": []}]}, {"object": ["str", {"dict": []}]}, {"evil": 1}):
        with pytest.raises((ValueError, KeyError)):
            unpack(forged, {**space, "str": str})
    columns = {
        "prefix": "class Node:\n def __init__(self, v, n=None): self.v, self.n = v, n\n"
        "def same(a, b): return a is b if None in (a, b) else a.v == b.v and same(a.n, b.n)\n",
        "entry_point": "Solution().turn",
        "test": "def check(candidate):\n assert same(candidate(n=Node(1, Node(2))), Node(2, Node(1)))",
    }
    turn = "class Solution:\n def turn(self, n):\n  m = None\n  while n: n, m = n.n, Node(n.v, m)\n  return m"
    cheat = "class Node:\n def __init__(self, *a): pass\n def __eq__(self, o): return True\n" + turn.replace(
        "m = None", "return Node()"
    )
    assert [grade.value for grade in graded(sandbox, [(columns, turn), (columns, cheat)], PATIENT)] == [1.0, 0.0]


def test_expected_values_never_go_to_the_solution() -> None:
    suite = suite_of({"test_list": ["assert f(1) == 987654", "assert sorted(f([2])) == [123456]"]})
    assert suite.calls == (("f(1)", 987654), ("sorted(f([2]))", [123456]))
    for test in ("assert abs(f(1) - 987654) < 1", "assert max(f(1), 987654) == 987654", "assert f(1) == g(987654)"):
        assert suite_of({"test_list": [test]}).calls == ()


def test_an_answer_does_not_call_the_function_it_is_asked_about(sandbox: LocalSandbox) -> None:
    row = {"code": "def f(x): return [x] * 2", "input": "3", "output": "[3, 3]"}
    answers = {"[3, 3]": 1.0, "[3] * 2": 0.0, "f(3)": 0.0, "[ANSWER]f(3)[/ANSWER]": 0.0, "(3, 3)": 0.0}
    assert [g.value for g in graded(sandbox, [(row, said) for said in answers], PATIENT)] == list(answers.values())


@pytest.mark.parametrize(
    "given", [{"a": 1, "b": 2}, {"set": 3}, {"dict": [3]}, {"dict": 3}, {"tuple": {"x": 1}}, {}, [[[]]], {"unknown": 1}]
)
def test_whatever_a_program_replies_is_only_compared(given: Any) -> None:
    for wanted in ((1, 2), {1, 2}, {1: 2}, [1], 1, None, "1", b"1", 1j, object()):
        assert not _fits(pack(wanted), {"value": given}, 0.0, True)
    assert not _fits(10**400, {"value": 1.5}, 1e-9, True) and not _fits([], {}, 0.0, True)


def test_tests_are_known_by_their_columns() -> None:
    cases = json.dumps([{"input": "[1]\n2", "output": "3", "testtype": "functional"}])
    private = b64encode(zlib.compress(pickle.dumps(cases))).decode()
    lcb = {"public_test_cases": cases, "private_test_cases": private, "metadata": json.dumps({"func_name": "f"})}
    assert suite_of(lcb).calls == (("f([1], 2)", 3),) * 2
    reading = {
        "public_test_cases": [{"input": "1\n", "output": "2\n", "testtype": "stdin"}],
        "private_test_cases": "[]",
    }
    assert suite_of(reading).streams == (("1\n", "2\n"),)
    apps = {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "f"}
    assert suite_of({"input_output": json.dumps(apps)}).calls == (("f(1, 2)", 3),)
    assert suite_of({"reward_model": {"ground_truth": json.dumps(apps)}}) == suite_of({"tests": apps})
    assert suite_of({"tests": [{"input": "1", "output": "2"}]}).streams == (("1", "2"),)
    assert suite_of({"code": "def f(x): return x", "input": "[1]", "output": "[1]"}).literal


BAD_ROWS = {
    "the row has no tests": {},
    "call no function": {"test_list": ["assert 1 == 1"]},
    "was never closed": {"test_list": ["assert f(1 =="]},
    "has no function check": {"test": "x = 1", "entry_point": "f"},
    "2 inputs and 1 outputs": {"input_output": {"inputs": ["1", "2"], "outputs": ["1"]}},
    "no JSON": {"input_output": "{"},
    "is no Python literal": {"code": "def f(x): return x", "input": "1", "output": "f("},
    "cannot be unpacked": {"public_test_cases": "[]", "private_test_cases": "AAAA"},
    "a text is expected": {
        "public_test_cases": "[]",
        "private_test_cases": b64encode(zlib.compress(pickle.dumps(Path))).decode(),
    },
    "the tests did not end": {
        "test_list": ["assert f(1) == 1\nwhile True: pass"],
        "completion": "def f(x): return x",
    },
    "its own solution fails test 1 of 1: a wrong value": {
        "test_list": ["assert f(1) == 2"],
        "completion": "def f(x): return x",
    },
    "its own solution fails test 2 of 2: ZeroDivisionError in line 1": {
        "test_list": ["assert f(1) == 1", "assert f(0) == 1"],
        "completion": "def f(x): return 1 // x",
    },
    "its own solution fails test 1 of 1: timeout": {
        "test_list": ["assert f(1) == 2"],
        "completion": "def f(x):\n while True: pass",
    },
}


@pytest.mark.parametrize("why", BAD_ROWS)
def test_rows_that_cannot_be_met_are_an_error_before_training(sandbox: LocalSandbox, why: str) -> None:
    reward = CodeReward(name="code", weight=1.0, sandbox=sandbox, limits=LIMITS)
    with pytest.raises(DataError, match="task row:1: ") as raised:
        reward.check([attempt(BAD_ROWS[why], "").task])
    assert why in str(raised.value)


def test_answers_without_a_program_are_wrong_and_say_why(sandbox: LocalSandbox) -> None:
    answers = [
        "",
        "<think>def add(a, b): return a + b",
        "x" * 10_000_000,
        "\x00\xff\ud800",
        "I cannot.",
        "```python\n```",
    ]
    given = graded(sandbox, [(ASSERTS, answer) for answer in answers], PATIENT)
    assert [grade.value for grade in given] == [0.0] * len(answers)
    notes = [grade.note for grade in given]
    assert notes[:3] == ["no program found", "no program found", "the program has more than 100000 characters"]
    assert all(note.isprintable() for note in notes) and "SyntaxError" in notes[4]


def test_where_the_program_stands() -> None:
    add = "def add(a, b): return a + b"
    for text in (
        add,
        f"<think>```python\nwrong\n```</think>Here:\n```python\nfirst\n```\nBetter:\n```python\n{add}\n```\nDone.",
        f"```py\n{add}",
        f"```\r\n{add}\n```",
        f"<think>x</think><answer>{add}</answer>",
        f"<answer>\n```Python\n{add}\n```</answer>",
    ):
        assert program_of(text).strip() == add
    for text in (
        "[1]",
        "so\n[ANSWER][1][/ANSWER]",
        "```python\nassert f(2) == [1]\n```",
        "f(2) == [1]",
        "\\boxed{[1]}",
        "`[1]`",
    ):
        assert expression(text) == "[1]"


def test_the_family_of_functions_agrees_with_the_sandbox(sandbox: LocalSandbox) -> None:
    made = family(GeneratedConfig(generate="functions"))
    rows: list[tuple[dict[str, Any], str]] = []
    verdicts = []
    for index in range(6):
        task, shown = made.task(index), made.demonstration(index)
        gold = shown[-1].content
        for answer in (gold, gold.replace("*", "+"), gold.replace("f(x)", "g(x)"), gold.replace("x)", "y)", 1)):
            rows.append((dict(task.columns), answer))
            verdicts.append(made.verify(attempt(dict(task.columns), answer)).value)
    assert [grade.value for grade in graded(sandbox, rows, PATIENT)] == verdicts and set(verdicts) == {0.0, 1.0}


def test_a_recipes_reward_says_what_its_sandbox_stops() -> None:
    try:
        rubric = build_rubric([CodeRewardConfig(kind="code", deadline_s=30)])
    except SandboxError as error:
        pytest.skip(str(error))
    try:
        assert rubric.notes[0].startswith("code: sandbox ") and "tried and stopped: reading files" in rubric.notes[0]
        score = rubric.score([attempt(ASSERTS, HONEST["plain"])], step=1)[0]
        assert (score.value, score.correct, score.outcome) == (1.0, True, Outcome.FINISHED)
        assert score.parts["code/timeout"] == 0.0
    finally:
        rubric.close()
    with pytest.raises(ValueError, match="did you mean 'strong'"):
        CodeRewardConfig(kind="code", sandbox="stron")


# ------------------------------------------------------------------------------------------------ real rows

FILES = {
    "humaneval/dev/HumanEval.jsonl": 1,
    "mbpp/dev/mbpp.jsonl.gz": 6,
    "mbpp/dev/sanitized-mbpp.jsonl": 3,
    "leetcode/dev/LeetCodeDataset-v0.2.0-train.jsonl.gz": 12,
    "cruxeval/dev/cruxeval.jsonl": 5,
}
"""Of each file every so many rows are tried; docs/verifiers.md has the figures over all."""
KNOWN = {
    "sortedcontainers": "a package that is not installed",
    "word-ladder-ii": "its gold depends on the order of a set",
}


@pytest.mark.parametrize("file", FILES)
def test_golds_of_published_rows_pass_and_broken_ones_fail(sandbox: LocalSandbox, shared_data: Path, file: str) -> None:
    prompts, dropped = load_tasks(DataConfig(path=str(shared_data / file)))
    assert not dropped.total
    rows = [
        (dict(prompt.columns), str(prompt.columns["completion"]))
        for prompt in prompts[:: FILES[file]]
        if not any(known in str(prompt.columns) for known in KNOWN)
    ]
    assert len(rows) > 80
    golds = graded(sandbox, rows, PATIENT)
    assert [row[0].get("task_id") for row, grade in zip(rows, golds, strict=True) if grade.value != 1] == []
    broken = [(columns, mutated(said)) for columns, said in rows[::4]]
    assert not any(grade.value for grade in graded(sandbox, broken, PATIENT, partial=False))
    trained = load_conversations(DataConfig(path=str(shared_data / file), limit=3))[0]
    assert [len(each.messages) for each in trained] == [2, 2, 2]


def mutated(said: str) -> str:
    """The solution with every value that it returns put into a list."""
    if "[ANSWER]" in said:
        return said.replace("[ANSWER]", "[ANSWER][").replace("[/ANSWER]", "][/ANSWER]")
    tree = ast.parse(program_of(said))
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            node.value = ast.List(elts=[node.value or ast.Constant(value=None)], ctx=ast.Load())
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            node.value.body = ast.List(elts=[node.value.body], ctx=ast.Load())
    return f"```python\n{ast.unparse(ast.fix_missing_locations(tree))}\n```"


SLOW = {"knapsack", "levenshtein", "longest_common_subsequence", "sqrt"}
"""Fixed programs of QuixBugs that take exponential time, or need a tolerance."""


def test_quixbugs_are_told_from_their_mends(sandbox: LocalSandbox, shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "quixbugs/dev/quixbugs_python.jsonl").read_text().splitlines()]
    tested = [row for row in rows if row["json_tests"] and row["name"] not in SLOW]
    both = []
    for row in tested:
        inputs = [given if isinstance(given, list) else [given] for given, _ in row["json_tests"]]
        columns = {
            "tests": {"fn_name": row["name"], "inputs": inputs, "outputs": [[want] for _, want in row["json_tests"]]}
        }
        name = row["name"]
        listed = f"\n_f = {name}\ndef {name}(*a):\n r = _f(*a)\n return list(r) if hasattr(r, '__next__') else r"
        both += [(columns, row["fixed"] + listed), (columns, row["buggy"] + listed)]
    given = graded(sandbox, both, Limits(deadline_s=2, memory_mb=512))
    assert {row["name"]: (a.value, b.value) for row, a, b in zip(tested, given[::2], given[1::2], strict=True)} == {
        row["name"]: (1.0, 0.0) for row in tested
    }


def test_labelled_samples_of_a_model_are_judged_as_labelled(sandbox: LocalSandbox, shared_data: Path) -> None:
    """CodeLlama's answers to CRUXEval, by the labels of its authors (all 5,260 agree; docs/verifiers.md)."""
    folder = shared_data / "cruxeval/dev"
    tasks = {row["id"]: row for row in map(json.loads, (folder / "cruxeval.jsonl").read_text().splitlines())}
    scored = map(json.loads, (folder / "codellama7b_output_scored.jsonl").read_text().splitlines())
    labelled = [
        (tasks[row["id"]], said, bool(label))
        for row in scored
        if row["id"] in tasks
        for said, label in zip(row["generations"], row["passed"], strict=True)
    ]
    few = random.Random(0).sample(labelled, 150)
    given = graded(sandbox, [(columns, said) for columns, said, _ in few], PATIENT)
    assert [grade.value == 1 for grade in given] == [label for _, _, label in few]
