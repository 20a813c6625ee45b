"""Users' reward functions, run unmodified in a process of their own.

Two signatures are known, told apart by the names of the parameters:

* TRL: `f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list`, plain or
  async, called once for all attempts; it gets what its signature takes. None means "does not apply".
* verl: `compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict`, called for each.

Whatever goes wrong over there (an exception, a hang, `sys.exit`, NaN, a list too short) is a failed grade with the
reason, never a zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from whet.envs.base import Attempt, Grade, Task
from whet.errors import RewardError
from whet.records import Message
from whet.sandbox.base import JSON, FailureKind, Result
from whet.sandbox.workers import WorkerPool


class FunctionReward:
    """The function that `path` (`file.py:function`) names; `deadline_s` is for one call.

    Raises `RewardError` where it cannot be loaded. With `judges`, its value of 1 means that the answer is right.
    """

    def __init__(self, *, name: str, weight: float, path: str, deadline_s: float, judges: bool = False) -> None:
        self.name, self.weight, self.judges = name, weight, judges
        # One process: the function may keep state. No memory limit: what it imports may reserve any address space.
        self._pool = WorkerPool("whet.envs.rewards.function_worker:load", arguments=[path], deadline_s=deadline_s)
        described = self._pool.map([None])[0]
        if described.failure is not None:
            self._pool.close()
            raise RewardError(f"reward {name!r}: {described.failure.message}")
        signature: Any = described.value
        self._verl: bool = signature["verl"]
        self._takes: frozenset[str] | None = None if signature["takes"] is None else frozenset(signature["takes"])

    def grade(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt, from one call (TRL) or one call each (verl)."""
        if not attempts:
            return []
        if self._verl:
            calls = [self._only_taken(_verl_arguments(attempt)) for attempt in attempts]
            results = self._pool.map([{"arguments": call} for call in calls])
            return [grade for result in results for grade in _grades(result, 1)]
        payload: JSON = {"arguments": self._only_taken(_trl_arguments(attempts)), "count": len(attempts), "step": step}
        return _grades(self._pool.map([payload])[0], len(attempts))

    def check(self, tasks: Sequence[Task]) -> None:
        """Nothing is known of what the function needs."""

    def close(self) -> None:
        """Kill the process."""
        self._pool.close()

    def _only_taken(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in arguments.items() if self._takes is None or key in self._takes}


def _trl_arguments(attempts: Sequence[Attempt]) -> dict[str, list[Any]]:
    """Prompts, completions and every column, each a list with one entry an attempt.

    Messages are lists of `{"role", "content"}`; where the row's prompt was plain text, both sides are strings.
    """
    names = {name for attempt in attempts for name in attempt.task.columns}
    columns: dict[str, list[Any]] = {
        name: [attempt.task.columns.get(name) for attempt in attempts] for name in sorted(names)
    }
    pairs = [(attempt, attempt.task.conversational) for attempt in attempts]
    columns["prompts"] = [_dicts(a.task.messages) if talk else a.task.messages[-1].content for a, talk in pairs]
    columns["completions"] = [_dicts(a.messages) if talk else a.answer for a, talk in pairs]
    columns["completion_ids"] = [list(attempt.completion_tokens) for attempt in attempts]
    return columns


def _verl_arguments(attempt: Attempt) -> dict[str, Any]:
    """verl's four, from its own columns or, for the ground truth, from `answer`."""
    columns = attempt.task.columns
    nested = columns.get("reward_model")
    inner = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    candidates = (columns.get("ground_truth"), inner, columns.get("answer"))
    return {
        "data_source": columns.get("data_source", ""),
        "solution_str": attempt.answer,
        "ground_truth": next((value for value in candidates if value is not None), None),
        "extra_info": columns.get("extra_info"),
    }


def _dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages in the OpenAI shape, as TRL hands them over."""
    return [_dict(message) for message in messages]


def _dict(message: Message) -> dict[str, Any]:
    shape: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shape["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return shape


def _grades(result: Result, count: int) -> list[Grade]:
    """The worker's list of grades, or one failure for all that the call was about."""
    if result.failure is not None:
        timed_out = result.failure.kind is FailureKind.TIMEOUT
        return [Grade(value=None, failure=result.failure.message, timed_out=timed_out)] * count
    values: Any = result.value
    return [Grade(**fields) for fields in values]
