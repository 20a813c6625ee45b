"""The worker's side of function rewards: call the user's function as TRL or verl would, check the values."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

from whet.sandbox.worker_main import load_function

VERL = frozenset({"data_source", "solution_str", "ground_truth"})
"""Parameters by which verl's `compute_score` is recognised."""
LONGEST_NOTE = 200


def load(path: str) -> Callable[[dict[str, Any] | None], Any]:
    """The function that answers payloads; None asks what the user's function takes."""
    function = load_function(path)
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    signature = {"verl": parameters.keys() >= VERL, "takes": None if everything else sorted(parameters)}

    def answer(payload: dict[str, Any] | None) -> Any:
        if payload is None:
            return signature
        if signature["verl"]:
            return [_verl_grade(_call(function, payload["arguments"]))]
        return _call_trl(function, payload, signature["takes"])

    return answer


def _call_trl(function: Callable[..., Any], payload: dict[str, Any], takes: Any) -> list[dict[str, Any]]:
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
    returned = _call(function, {**payload["arguments"], **given})
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
        raise TypeError(f"returned a {type(returned).__name__}, not a list with one number for each completion")
    values = list(returned)
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values for {count} completions")
    graded = zip(map(_grade, values), notes, strict=True)
    return [{**grade, "note": "; ".join(note), "metrics": metrics} for grade, note in graded]


def _verl_grade(returned: Any) -> dict[str, Any]:
    """A number, or a dict whose `score` counts and whose other numbers are logged."""
    if not isinstance(returned, Mapping):
        return _grade(returned)
    if "score" not in returned:
        raise TypeError(f"returned a dict without 'score': {sorted(map(str, returned))}")
    others = {str(key): value for key, value in returned.items() if key != "score"}
    return {**_grade(returned["score"]), "metrics": {k: float(v) for k, v in others.items() if _finite(v)}}


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    returned = function(**arguments)
    return asyncio.run(_finish(returned)) if inspect.isawaitable(returned) else returned


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


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
