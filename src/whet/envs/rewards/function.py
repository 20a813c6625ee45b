"""Users' reward functions, run unmodified in a process of their own.

The signature is recognised by the names of the parameters, when the function is loaded:

* TRL, open-r1: `f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list`,
  plain, async or a callable object, called once for all attempts; it gets what its signature takes. None means "does
  not apply".
* verl: `compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict`, called for each;
  the first and the last may be left out.
* OpenRLHF: `reward_func(queries, prompts, labels) -> dict with "rewards" | list`, called once.
* reasoning-gym: `score_answer(answer, entry) -> float`, called for each; `entry` is the row.

What goes wrong there (an exception, a hang, `sys.exit`, NaN, a list too short) is a failed grade with the reason.
Where one call for all attempts fails, each is called again alone, so that one answer costs the others nothing;
`envs.base.attribute` decides whether the answer or the function was at fault.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from whet.envs.base import Attempt, Call, Grade, Separate, Task, attribute, require
from whet.envs.rewards.answers import after_thinking, marked_answer
from whet.envs.rewards.function_worker import load
from whet.errors import DataError, RewardError
from whet.records import Message
from whet.sandbox.base import JSON, Failure, FailureKind, Result
from whet.sandbox.workers import WorkerPool
from whet.target import describe

ALONE = frozenset({"verl", "entry"})
"""Forms that are called for each attempt."""
MISSHAPEN = "the function's value has the wrong shape"


class FunctionReward(Separate):
    """The function that `path` (`file.py:function`) names, or that is handed over; `deadline_s` is for one call.

    With `args` it makes the function. One that is handed over runs in this process, where it is given up when it is
    late, and cannot be killed. Raises `RewardError` where it cannot be loaded. With `judges`, its value of 1 means that
    the answer is right.
    """

    def __init__(
        self,
        *,
        name: str,
        weight: float,
        path: str | Callable[..., Any],
        deadline_s: float,
        args: Mapping[str, Any] | None = None,
        judges: bool = False,
    ) -> None:
        self.name, self.weight, self.judges = name, weight, judges
        # One process: the function may keep state. No memory limit: what it imports may reserve any address space.
        self._pool: WorkerPool | _Here = (
            WorkerPool("whet.envs.rewards.function_worker:load", arguments=[path, args], deadline_s=deadline_s)
            if isinstance(path, str)
            else _Here(partial(load, path, args), deadline_s)
        )
        described = self._pool.map([None])[0]
        if described.failure is not None:
            self._pool.close()
            raise RewardError(f"reward {name!r}: {described.failure.message}")
        signature: Any = described.value
        self._form: str = signature["form"]
        self._needs: list[str] = signature["needs"]
        self._gold: str | None = signature["gold"]
        self._takes: frozenset[str] | None = None if signature["takes"] is None else frozenset(signature["takes"])

    @property
    def alone(self) -> bool:  # type: ignore[override]
        """Whether the function is called for each attempt."""
        return self._form in ALONE

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt, from one call for all or one call each."""
        call = partial(self._call, step=step)
        return call(attempts) if self.alone else self._together(attempts, call)

    def settle(self, attempts: Sequence[Attempt], grades: Sequence[Grade], *, step: int) -> list[Grade]:
        """Whose fault a lost grade is; of values that are none nothing can be said."""
        if any(grade.note == MISSHAPEN for grade in grades):
            return list(grades)
        return attribute(attempts, grades, partial(self._call, step=step))

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task without a column that the function cannot do without."""
        for task in tasks:
            for column in self._needs:
                if column not in task.columns:
                    require(task, column, self.name)
            if self._gold is not None and truth(task.columns) is None:
                raise DataError(
                    f"task {task.id}: reward {self.name!r} gets no {self._gold}; name its column in data.columns: "
                    f"{{ground_truth: COLUMN}}; there are {', '.join(sorted(task.columns)) or 'none'}"
                )

    def close(self) -> None:
        """Kill the process."""
        self._pool.close()

    def _together(self, attempts: Sequence[Attempt], call: Call) -> list[Grade]:
        """The grades of one call; where that failed, of one call each, until two were late and none was graded."""
        result = call(attempts)
        if len(attempts) < 2 or not all(grade.failure for grade in result) or result[0].note == MISSHAPEN:
            return result
        grades: list[Grade] = []
        for attempt in attempts:
            hopeless = len(grades) >= 2 and all(grade.failure and grade.timed_out for grade in grades)
            grades += [grades[-1]] if hopeless else call([attempt])
        return grades

    def _call(self, attempts: Sequence[Attempt], step: int) -> list[Grade]:
        if not attempts:
            return []
        if self._form in ALONE:
            arguments = _verl_arguments if self._form == "verl" else _entry_arguments
            results = self._pool.map([{"arguments": self._only_taken(arguments(attempt))} for attempt in attempts])
            return [grade for result in results for grade in _grades(result, 1)]
        columns = _trl_arguments(attempts) if self._form == "trl" else _openrlhf_arguments(attempts)
        payload: JSON = {"arguments": self._only_taken(columns), "count": len(attempts), "step": step}
        return _grades(self._pool.map([payload])[0], len(attempts))

    def _only_taken(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in arguments.items() if self._takes is None or key in self._takes}


class _Here:
    """What of `WorkerPool` is used, for a function of this process: each payload in a thread, which may be given up."""

    def __init__(self, start: Callable[[], Callable[[Any], Any]], deadline_s: float) -> None:
        self._start, self._deadline_s = start, deadline_s
        self._answer: Callable[[Any], Any] | None = None

    def map(self, payloads: Sequence[JSON]) -> list[Result]:
        """One result for each payload, in order; never raises for what the function does."""
        return [self._one(payload) for payload in payloads]

    def close(self) -> None:
        """Nothing to end: a thread that is late ends with this process."""

    def _one(self, payload: JSON) -> Result:
        found = [
            Result(failure=Failure(kind=FailureKind.TIMEOUT, message=f"did not answer within {self._deadline_s:g} s"))
        ]

        def work() -> None:
            try:
                self._answer = self._answer or self._start()
                found.append(Result(value=self._answer(payload)))
            except BaseException as error:  # noqa: BLE001  whatever it raises, SystemExit included, is its answer
                found.append(Result(failure=Failure(kind=FailureKind.RAISED, message=describe(error))))

        thread = threading.Thread(target=work, name="whet-reward", daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if len(found) == 1:  # it keeps the event loop that it has
            self._answer = None
        return found[-1]


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


def _openrlhf_arguments(attempts: Sequence[Attempt]) -> dict[str, list[Any]]:
    """OpenRLHF's three: the prompt with the answer behind it, the prompt alone, and the gold."""
    prompts = ["\n".join(message.content for message in attempt.task.messages) for attempt in attempts]
    return {
        "queries": [prompt + attempt.answer for prompt, attempt in zip(prompts, attempts, strict=True)],
        "prompts": prompts,
        "labels": [truth(attempt.task.columns) for attempt in attempts],
    }


def _verl_arguments(attempt: Attempt) -> dict[str, Any]:
    """verl's four, from its own columns or, for the ground truth, from `answer`."""
    columns = attempt.task.columns
    return {
        "data_source": columns.get("data_source", ""),
        "solution_str": attempt.answer,
        "ground_truth": truth(attempt.task.columns),
        "extra_info": columns.get("extra_info"),
    }


def _entry_arguments(attempt: Attempt) -> dict[str, Any]:
    """reasoning-gym's two: what the completion marks as its answer, else all of it, and the row."""
    marked = marked_answer(attempt.answer)
    said = after_thinking(attempt.answer).strip() if marked is None else marked
    return {"answer": said, "entry": dict(attempt.task.columns)}


def truth(columns: Mapping[str, Any]) -> Any:
    """The gold in verl's or OpenRLHF's own columns, else in `answer`; None where there is none."""
    nested = columns.get("reward_model")
    inner = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    candidates = (columns.get("ground_truth"), inner, columns.get("label"), columns.get("answer"))
    return next((value for value in candidates if value is not None), None)


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
        remedy = f"; deadline_s is for one call, of {count} answers here" if timed_out else ""
        return [Grade(value=None, failure=result.failure.message + remedy, timed_out=timed_out)] * count
    values: Any = result.value
    if isinstance(values, str):  # the function answered, in a shape that no answer is to blame for
        return [Grade(value=None, failure=values, note=MISSHAPEN)] * count
    return [Grade(**fields) for fields in values]
