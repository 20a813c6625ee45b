"""What a row's tests ask of a program, read from the columns of the data sets that have tests.

Which data sets those are is a table of `docs/verifiers.md`.

An assert that compares a call with a literal becomes the two: the call goes to the solution's process, the value stays.
Asserts of any other form are a program, which runs in a process of its own (`code_side.run_tests`).
"""

from __future__ import annotations

import ast
import base64
import builtins
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.envs.rewards.code_side import pack

CONVERSIONS = ("int", "float", "str", "list", "tuple", "set", "sorted", "len", "dict")
"""Functions of one argument that a test may wrap a call in."""
HELPFUL = "import collections, copy, functools, heapq, itertools, math, random, re, string, sys\n"
"""What tests use without saying so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The tests of one task; of `calls`, `streams` and `scripts` one is not empty."""

    before: str = ""
    """Code that runs before the solution: imports, what its prompt began."""
    after: str = ""
    """Code that runs after it and before the tests."""
    entry: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    """Expressions for the solution's process, and the values that they must have, packed."""
    streams: tuple[tuple[str, str], ...] = ()
    """Standard input, and the output that must follow."""
    scripts: tuple[str, ...] = ()
    """Tests that must run."""
    literal: bool = False
    """The answer is a Python literal, the value of the one call, and no program."""
    tuples: bool = True
    """Whether a tuple differs from a list: not where expected values were JSON."""

    @property
    def size(self) -> int:
        """How many tests there are."""
        return len(self.calls) + len(self.streams) + len(self.scripts)


def suite_of(columns: Mapping[str, Any]) -> Suite:
    """The tests of a row. Raises ValueError saying what is wrong with them."""
    before = str(columns.get("prefix") or "")
    if "test_list" in columns:
        setup = "\n".join([*(columns.get("test_imports") or []), columns.get("test_setup_code") or ""])
        return _asserts(list(columns["test_list"]), HELPFUL + setup)
    if {"base_input", "canonical_solution", "entry_point"} <= columns.keys():
        return _compared(columns, before)
    if {"test", "entry_point"} <= columns.keys():
        return _check(columns["test"], columns["entry_point"], before)
    if {"code", "input", "output"} <= columns.keys():
        call = (f"f({columns['input']})", pack(_literal(columns["output"])))
        return Suite(before=columns["code"], calls=(call,), entry="f", literal=True)
    if "public_test_cases" in columns:
        cases = [*_cases(columns["public_test_cases"]), *_cases(columns.get("private_test_cases") or [])]
        named = _json(columns.get("metadata") or {}).get("func_name")
        return _pairs([case["input"] for case in cases], [case["output"] for case in cases], named, lines=True)
    model = columns.get("reward_model")
    for value in (columns.get("input_output"), columns.get("tests"), model and model.get("ground_truth")):
        if value:
            return _listed(_json(value))
    raise ValueError("the row has no tests; there are test_list, test, input_output, tests or test cases in known rows")


# ------------------------------------------------------------------------------------------------ asserts


def _check(test: str, entry: str, before: str) -> Suite:
    """HumanEval's and LeetCode's `def check(candidate)`: its asserts one by one, or as it stands where it is more."""
    tree = ast.parse(test)
    body = next((f.body for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "check"), None)
    if body is None:
        raise ValueError("column test has no function check(candidate)")
    calls = _calls(body, entry)
    scripts = () if calls else (f"{test}\ncheck(candidate)",)
    return Suite(before=before, entry=entry, calls=calls, scripts=scripts, after=HELPFUL)


COMPARED = """
from copy import deepcopy as _copy
from math import isclose as _isclose


def _alike(left, right, atol):
    if isinstance(left, float) and isinstance(right, (int, float)):
        return _isclose(left, right, rel_tol=0 if atol else 1e-6, abs_tol=atol or 1e-6)
    if isinstance(left, (list, tuple)) and type(left) is type(right) and len(left) == len(right):
        return all(_alike(a, b, atol) for a, b in zip(left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


for _given in {inputs!r}:
    assert _alike({entry}(*_copy(_given)), candidate(*_copy(_given)), {atol!r})
"""
"""EvalPlus compares with its own solution, and floats within `atol`, else 1e-6."""


def _compared(columns: Mapping[str, Any], before: str) -> Suite:
    """EvalPlus' files: inputs alone, whose values its own solution gives, in the process that the tests run in."""
    inputs = [*_json(columns["base_input"]), *_json(columns.get("plus_input") or [])]
    atol = float(columns.get("atol") or 0)
    script = COMPARED.format(inputs=inputs, entry=columns["entry_point"], atol=atol)
    own = f"{before}{columns['canonical_solution']}"
    return Suite(before=before, entry=columns["entry_point"], scripts=(f"{own}\n{script}",), after=HELPFUL)


def _asserts(tests: Sequence[str], after: str) -> Suite:
    """MBPP's; the function that they call is the first whose name is none of Python's own, nor of the setup's."""
    helpers = {each.name for each in ast.parse(after).body if isinstance(each, ast.FunctionDef)}
    trees = [statement for test in tests for statement in ast.parse(test).body]
    called = [n.func for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [f.id for f in called if isinstance(f, ast.Name) and _named(f)]
    entry = next((name for name in names if name not in helpers), None)
    if entry is None:
        raise ValueError("the asserts in test_list call no function")
    calls = () if helpers & {*names} else _calls(trees, None)  # a helper sees the expected values
    return Suite(after=after, entry=entry, calls=calls, scripts=() if calls else tuple(tests))


def _named(callee: ast.expr) -> bool:
    return isinstance(callee, ast.Name) and not hasattr(builtins, callee.id)


def _calls(statements: Sequence[ast.stmt], entry: str | None) -> tuple[tuple[str, Any], ...]:
    """Calls and their values; nothing where a statement is no assert of that form. `entry` stands for `candidate`."""
    found = []
    for statement in statements:
        match statement:
            case ast.Assert(test=ast.Constant(value=value)) if value:
                continue
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq() | ast.Is()], comparators=[value])):
                pass
            case _:
                return ()
        inner = call
        while isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in CONVERSIONS:
            if len(inner.args) != 1 or inner.keywords:
                return ()
            inner = inner.args[0]
        if not isinstance(inner, ast.Call) or not _named(inner.func):
            return ()
        if entry is not None:
            if ast.unparse(inner.func) != "candidate":
                return ()
            inner.func = ast.parse(entry, mode="eval").body
        try:
            found.append((ast.unparse(call), pack(ast.literal_eval(value))))
        except ValueError:
            return ()
    return tuple(found)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"the expected value {text[:60]!r} is no Python literal") from error


# --------------------------------------------------------------------------------------- inputs and outputs


def _listed(tests: Any) -> Suite:
    """APPS' `{inputs, outputs, fn_name}`, or a list of `{input, output}`."""
    if isinstance(tests, Mapping):
        return _pairs(tests["inputs"], tests["outputs"], tests.get("fn_name"), lines=False)
    named = next((case["fn_name"] for case in tests if case.get("fn_name")), None)
    return _pairs([case["input"] for case in tests], [case["output"] for case in tests], named, lines=False)


def _pairs(inputs: Sequence[Any], outputs: Sequence[Any], named: str | None, *, lines: bool) -> Suite:
    """`lines`: the arguments of a call are a line of JSON each, and so is its value (LiveCodeBench)."""
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"there are {len(inputs)} inputs and {len(outputs)} outputs")
    if not named:
        return Suite(streams=tuple((_text(i), _text(o)) for i, o in zip(inputs, outputs, strict=True)))
    calls = []
    for given, wanted in zip(inputs, outputs, strict=True):
        arguments = [json.loads(line) for line in given.splitlines()] if lines else given
        value = json.loads(wanted) if lines else wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
        calls.append((f"{named}({', '.join(map(repr, arguments))})", pack(value)))
    return Suite(entry=named, calls=tuple(calls), tuples=False, before="from typing import *\n" + HELPFUL)


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"its tests are no JSON: {error}") from error


FRAMING = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
"""Opcodes of a pickle that hold nothing."""


def _packed_text(value: str) -> str:
    """The text that LiveCodeBench packs with zlib and pickle. The pickle is read as a list of opcodes, never run."""
    opcodes = pickletools.genops(zlib.decompress(base64.b64decode(value)))
    held = [(opcode.name, argument) for opcode, argument, _ in opcodes if opcode.name not in FRAMING]
    name, text = held[0] if len(held) == 1 else ("more than a text", None)
    if not isinstance(text, str) or not name.endswith("UNICODE"):
        raise ValueError(f"it holds {name}, and a text is expected")
    return text


def _cases(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        try:
            value = _packed_text(value)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"private_test_cases cannot be unpacked: {error}") from error
    return list(_json(value))
