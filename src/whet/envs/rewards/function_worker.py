"""The worker's side of function rewards: call the user's function as its library would, check the values."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from whet.target import TargetError, load_function

FORMS = {
    "verl": {"solution_str", "ground_truth"},
    "openrlhf": {"queries", "prompts", "labels"},
    "entry": {"answer", "entry"},
    "trl": {"completions"},
}
"""Parameters by which a signature is recognised, the first that it has all of."""
GIVEN = {
    "verl": {"data_source", "extra_info"},
    "openrlhf": set[str](),
    "entry": set[str](),
    "trl": {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"},
}
"""What else each form is given."""
GOLDS = {"verl": "ground_truth", "openrlhf": "labels"}
"""The parameter that gets the gold answer."""
LONGEST_NOTE = 200


class Misshapen(Exception):
    """The value is no number for each answer; the message says what it is."""


def load(named: str | Callable[..., Any], args: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    """The function that answers payloads; None asks what the user's function takes.

    With `args` what is named is called with them and returns the function; a class is made an object of.
    """
    function: Any = load_function(named) if isinstance(named, str) else named
    path = named if isinstance(named, str) else getattr(named, "__name__", type(named).__name__)
    if args is not None or inspect.isclass(function):
        try:
            inspect.signature(function).bind(**(args or {}))
        except TypeError as error:
            raise TargetError(f"{path}{inspect.signature(function)}: args: {error}") from error
        function = function(**(args or {}))
    signature = describe_signature(path, function)
    call = partial(_call, asyncio.Runner(), function)

    def answer(payload: dict[str, Any] | None) -> Any:
        if payload is None:
            return signature
        try:
            match signature["form"]:
                case "verl" | "entry":
                    return [_one_grade(call(payload["arguments"]))]
                case "openrlhf":
                    return _openrlhf_grades(call(payload["arguments"]), payload["count"])
                case _:
                    return _call_trl(call, payload, signature["takes"])
        except Misshapen as error:
            return str(error)

    return answer


def load_source(source: str) -> Callable[[dict[str, Any]], float]:
    """The function that answers with what `grade(sample, item)` of an OpenAI Python grader returns."""
    names: dict[str, Any] = {"__name__": "grader"}
    exec(compile(source, "grader.py", "exec"), names)  # the recipe's own code, in a process of its own
    grade = names.get("grade")
    if not callable(grade):
        raise TargetError("a python grader defines grade(sample, item)")

    def answer(payload: dict[str, Any]) -> float:
        number = _number(grade(payload["sample"], payload["item"]))
        if not math.isfinite(number):
            raise ValueError(f"returned {number}")
        return number

    return answer


def describe_signature(path: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Form, parameters that it takes (None: any), columns that it needs, the one for the gold. Raises `TargetError`."""
    parameters = inspect.signature(function).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    form = next((name for name, needed in FORMS.items() if needed <= parameters.keys()), "trl" if any_name else None)
    if form is None or any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in parameters.values()):
        known = ", ".join(f"({', '.join(sorted(needed))})" for needed in FORMS.values())
        raise TargetError(
            f"{path} takes ({', '.join(parameters)}), no signature of a reward; known are {known}; what makes a reward "
            "is called with args"
        )
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = {name for name, p in parameters.items() if p.kind in plain and p.default is inspect.Parameter.empty}
    needs = sorted(required - FORMS[form] - GIVEN[form])
    if needs and form != "trl":
        raise TargetError(f"{path} needs {', '.join(needs)}, which its form ({form}) is not given; give them defaults")
    gold = GOLDS[form] if form in GOLDS and GOLDS[form] in required else None
    return {"form": form, "takes": None if any_name else sorted(parameters), "needs": needs, "gold": gold}


def _call_trl(call: Callable[[dict[str, Any]], Any], payload: dict[str, Any], takes: Any) -> list[dict[str, Any]]:
    """One call for all attempts, with TRL's three helpers where the signature takes them."""
    count = payload["count"]
    notes: list[list[str]] = [[] for _ in range(count)]
    metrics: dict[str, float] = {}

    def log_extra(column: str, values: list[Any]) -> None:
        for note, value in zip(notes, values, strict=True):
            note.append(f"{column}={value}"[:LONGEST_NOTE])

    def log_metric(name: str, value: float) -> None:
        metrics[name] = _number(value)

    helpers = {
        "trainer_state": SimpleNamespace(global_step=payload["step"]),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }
    given = {name: helper for name, helper in helpers.items() if takes is None or name in takes}
    returned = call({**payload["arguments"], **given})
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
        raise Misshapen(f"returned a {type(returned).__name__}, not a list with one number for each completion")
    graded = zip(map(_grade, _each(returned, count)), notes, strict=True)
    return [{**grade, "note": "; ".join(note), "metrics": metrics} for grade, note in graded]


def _each(returned: Any, count: int) -> list[Any]:
    """One value for each answer, from a list, tuple, array or tensor."""
    values = list(returned)
    if len(values) != count:
        raise Misshapen(f"returned {len(values)} values for {count} completions")
    return values


def _openrlhf_grades(returned: Any, count: int) -> list[dict[str, Any]]:
    """`rewards` of a dict, or a list or tensor; the lists in `extra_logs` are logged."""
    logs: Mapping[str, Any] = {}
    if isinstance(returned, Mapping):
        if "rewards" not in returned:
            raise Misshapen(f"returned a dict without 'rewards': {sorted(map(str, returned))}")
        logs, returned = returned.get("extra_logs") or {}, returned["rewards"]
    if not hasattr(returned, "__iter__") or isinstance(returned, str):
        raise Misshapen(f"returned a {type(returned).__name__}, not a list with one number for each query")
    grades = [_grade(value) for value in _each(returned, count)]
    columns = {str(name): _each(values, count) for name, values in logs.items() if hasattr(values, "__iter__")}
    return [
        {**grade, "metrics": {name: _number(values[place]) for name, values in columns.items()}}
        for place, grade in enumerate(grades)
    ]


def _one_grade(returned: Any) -> dict[str, Any]:
    """A number, or a dict whose `score` counts and whose other numbers are logged."""
    if not isinstance(returned, Mapping):
        return _grade(returned)
    if "score" not in returned:
        raise Misshapen(f"returned a dict without 'score': {sorted(map(str, returned))}")
    graded = {str(key): _grade(value)["value"] for key, value in returned.items() if key != "score"}
    return {**_grade(returned["score"]), "metrics": {key: value for key, value in graded.items() if value is not None}}


def _call(runner: asyncio.Runner, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the function returns; an awaitable is finished in the one event loop of all calls, which what a module keeps
    (a semaphore, an HTTP client) belongs to."""
    returned = function(**arguments)
    return runner.run(_finish(returned)) if inspect.isawaitable(returned) else returned


async def _finish(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _grade(value: Any) -> dict[str, Any]:
    """The fields of a `Grade`: a finite number, None for "does not apply", or a failure."""
    if value is None:
        return {"value": None}
    try:
        number = _number(value)
    except TypeError as error:
        return {"value": None, "failure": str(error)}
    return {"value": number} if math.isfinite(number) else {"value": None, "failure": f"returned {number}"}


def _number(value: Any) -> float:
    """A float from a number, or from a scalar of numpy or torch. Raises TypeError for anything else."""
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, int | float):
        raise TypeError(f"returned a {type(value).__name__}, not a number")
    return float(plain)
