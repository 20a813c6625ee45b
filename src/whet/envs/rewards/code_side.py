"""What runs in the sandbox for tests of functions: the solution's side, which answers calls, and the tests' side.

This file goes there as text, so it needs the standard library alone. The two sides are two processes. Between them, and
between each and the grader, pass lines of JSON with plain data: never an object, never an expected value to a solution.
Standard output carries the replies; what a solution prints goes to standard error.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
ENDS = (StopIteration, StopAsyncIteration)
"""What ends the loop of a test that calls within `map`, as if all had been tried: never raised for a solution."""
SPACE = "solution"
"""The module that the code runs as, which its classes name."""


def pack(value: Any) -> Any:
    """Plain data as JSON: scalars and lists as themselves, all else as an object with its type as the one key."""
    if value is None:
        return None
    for scalar in (bool, int, float, str):
        if isinstance(value, scalar):
            return scalar(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", True):
        return pack(value.item())  # a scalar of numpy, which equals Python's
    if isinstance(value, list):
        return [pack(item) for item in value]
    for name, sequence in SEQUENCES.items():
        if isinstance(value, sequence):
            return {name: [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if type(value).__module__ == SPACE and hasattr(value, "__dict__"):
        return {"object": [type(value).__name__, pack(vars(value))]}
    return {"unknown": [type(value).__name__, bool(value)]}


def unpack(data: Any, space: dict[str, Any]) -> Any:
    """The value again; objects only of classes that `space` defines, and of unknown ones that they are true.

    Raises ValueError or KeyError for anything else.
    """
    if isinstance(data, list):
        return [unpack(item, space) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, inside),) = data.items()
    if kind in SEQUENCES:
        return SEQUENCES[kind](unpack(item, space) for item in inside)
    if kind == "dict":
        return {unpack(key, space): unpack(item, space) for key, item in inside}
    if kind == "bytes":
        return inside.encode("latin-1")
    if kind == "complex":
        return complex(*inside)
    if kind == "unknown" and inside[1] is True:
        return object()
    cls = space[inside[0]] if kind == "object" else None
    if not isinstance(cls, type) or cls.__module__ != SPACE:
        raise ValueError(f"no plain data: {kind}")
    made: Any = object.__new__(cls)
    vars(made).update(unpack(inside[1], space))
    return made


def answer_calls() -> None:
    """The solution's side: run code, evaluate calls, one reply for each line."""
    lines, say, space = _begin()
    for line in lines:
        try:
            asked = json.loads(line)
            value = None
            if "source" in asked:
                exec(compile(asked["source"], "solution.py", "exec"), space)
                _method_as_function(space, asked["entry"])
            elif "call" in asked:
                value = eval(asked["call"], space)
            else:
                positional, named = unpack(asked["arguments"], space)
                value = eval(asked["entry"], space)(*positional, **named)
            said = json.dumps({"value": pack(value)})
        except BaseException as error:  # noqa: BLE001
            said = json.dumps({"raised": type(error).__name__, "line": _line_of(error)})
        say(said)


def run_tests() -> None:
    """The tests' side: what they call is asked of the grader, line by line; at last which of them passed."""
    lines, say, space = _begin()
    told = json.loads(next(lines))
    random.seed(0)

    def candidate(*positional: Any, **named: Any) -> Any:
        say(json.dumps({"arguments": pack([list(positional), named])}))
        reply = json.loads(next(lines))
        if "raised" not in reply:
            return unpack(reply["value"], space)
        kind = getattr(builtins, str(reply["raised"]), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ENDS):
            raise kind
        raise Exception

    exec(compile(told["setup"], "tests.py", "exec"), space)
    space["candidate"] = candidate
    if told["entry"].isidentifier():
        space[told["entry"]] = candidate
    passed = []
    for source in told["tests"]:
        try:
            exec(compile(source, "tests.py", "exec"), space)
            passed.append(True)
        except BaseException:  # noqa: BLE001
            passed.append(False)
    say(json.dumps({"passed": passed}))


def _begin() -> tuple[Iterator[str], Callable[[str], None], dict[str, Any]]:
    """Where lines come from, where they go, and a fresh module; the program itself finds no input to read."""
    sys.set_int_max_str_digits(0)
    replies = os.fdopen(os.dup(1), "w")
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(text: str) -> None:
        replies.write(text + "\n")
        replies.flush()

    return lines, say, {"__name__": SPACE, "__builtins__": builtins}


def _method_as_function(space: dict[str, Any], entry: str) -> None:
    """LeetCode's `class Solution` where a test calls a function; each call has an instance of its own."""
    cls = space.get("Solution")
    if isinstance(cls, type) and entry not in space and hasattr(cls, entry):

        def call(*positional: Any, **named: Any) -> Any:
            return getattr(cls(), entry)(*positional, **named)

        space[entry] = call


def _line_of(error: BaseException) -> int:
    trace, line = error.__traceback__, 0
    while trace:
        line, trace = trace.tb_lineno, trace.tb_next
    return line
