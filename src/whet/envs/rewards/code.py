"""Programs as answers: run in a sandbox on the inputs of the row's tests, and compared here with what must come out.

The solution's process gets inputs and gives plain data; tests, expected values and the verdict are never in it. A
program that loops, exits, floods or breaks its sandbox is a wrong answer, counted under its own name; what the
sandbox itself loses is unscored.
"""

from __future__ import annotations

import asyncio
import json
import marshal
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.envs.base import Attempt, Grade, Separate, Task
from whet.envs.rewards import code_side
from whet.envs.rewards.answers import after_thinking, marked_answer
from whet.envs.rewards.code_tests import Suite, suite_of
from whet.errors import DataError, SandboxError
from whet.records import Message
from whet.sandbox.base import Limits, ProgramOutcome, ProgramSession, Sandbox, Status

LONGEST = 100_000
"""Characters of a program; a longer answer is wrong without being run."""
TALKS = 32
"""Tests that run at once: each has two processes, and eight descriptors."""
COUNTED = (Status.EXITED, Status.SIGNALLED, Status.TIMEOUT, Status.MEMORY, Status.OUTPUT, Status.BROKE)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def _side(call: str) -> str:
    """`code_side` as a program, compiled for this Python (which takes longer than to run it) and as text for others."""
    text = f"{Path(code_side.__file__).read_text()}\n\n{call}()\n"
    tag, compiled = sys.implementation.cache_tag, marshal.dumps(compile(text, "code_side.py", "exec"))
    fits = f"sys.implementation.cache_tag == {tag!r}"
    return f"import marshal, sys\nexec(marshal.loads({compiled!r}) if {fits} else {text!r})\n"


ANSWERS, TESTS = _side("answer_calls"), _side("run_tests")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Which tests passed, and how the program ended where it did not answer them all."""

    passed: tuple[bool, ...]
    status: Status = Status.FINISHED
    note: str = ""


class CodeReward(Separate):
    """1 if the program passes all of the row's tests, else 0; `partial`: the share that it passes.

    `limits` hold for each run: all calls of a task together, or one input. `tolerance` is relative, of floats.
    """

    judges = controlled = True

    def __init__(
        self,
        *,
        name: str,
        weight: float,
        sandbox: Sandbox,
        limits: Limits,
        partial: bool = False,
        tolerance: float = 0.0,
    ) -> None:
        self.name, self.weight, self._sandbox, self._limits = name, weight, sandbox, limits
        self._partial, self._tolerance = partial, tolerance
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whet-code")
        self._suites: dict[str, tuple[Mapping[str, Any], Suite]] = {}

    def each(self, attempts: Sequence[Attempt], *, step: int) -> list[Grade]:
        """One grade for each attempt."""
        return [self._grade(verdict) for verdict in self._verdicts(attempts)]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `DataError` for the first task without tests, or whose own solution (`completion`) fails them."""
        golds = []
        for task in tasks:
            self._suite(task)
            if isinstance(gold := task.columns.get("completion"), str):
                said = (Message(role="assistant", content=gold),)
                golds.append(Attempt(task=task, messages=said))
        for attempt, verdict in zip(golds, self._verdicts(golds), strict=True):
            if verdict.status is Status.MACHINERY:
                raise SandboxError(f"the sandbox failed on the solution of task {attempt.task.id}: {verdict.note}")
            if not all(verdict.passed):
                failed = verdict.passed.index(False) + 1
                why = f"its own solution fails test {failed} of {len(verdict.passed)}: {_words(verdict)}"
                raise DataError(f"task {attempt.task.id}: {why}; mend the row, or leave it out with on_bad_row: drop")

    def describe(self) -> str:
        """What the sandbox stops."""
        return f"{self.name}: {self._sandbox.describe()}"

    def close(self) -> None:
        """End the sandbox."""
        self._thread.shutdown()
        self._sandbox.close()

    def _grade(self, verdict: _Verdict) -> Grade:
        if verdict.status is Status.MACHINERY:
            return Grade(value=None, failure=f"the sandbox failed: {verdict.note}")
        share = sum(verdict.passed) / len(verdict.passed)
        return Grade(
            value=share if self._partial else float(share == 1),
            gave_up=verdict.status is Status.BROKE,
            note="" if share == 1 else _words(verdict),
            metrics={"tests": share, **{status.value: float(verdict.status is status) for status in COUNTED}},
        )

    def _verdicts(self, attempts: Sequence[Attempt]) -> list[_Verdict]:
        """All at once, in an event loop of its own: the caller may have one that runs."""

        async def everyone() -> list[_Verdict]:
            most = 2 * (os.cpu_count() or 1)
            turns, talks = asyncio.Semaphore(most), asyncio.Semaphore(min(most, TALKS))
            each = ((attempt, talks if self._suite(attempt.task).scripts else turns) for attempt in attempts)
            return await asyncio.gather(*(self._judge(attempt, turn) for attempt, turn in each))

        return self._thread.submit(asyncio.run, everyone()).result()

    async def _judge(self, attempt: Attempt, turns: asyncio.Semaphore) -> _Verdict:
        suite = self._suite(attempt.task)
        program = expression(attempt.answer) if suite.literal else program_of(attempt.answer)
        if not program.strip() or len(program) > LONGEST:
            why = f"the program has more than {LONGEST} characters" if program.strip() else "no program found"
            return _Verdict((False,) * suite.size, note=why)
        async with turns:
            if suite.streams:
                return await self._by_streams(suite, program)
            return await (self._by_scripts if suite.scripts else self._by_calls)(suite, program)

    def _suite(self, task: Task) -> Suite:
        """The task's tests, read once. Raises `DataError`."""
        columns, suite = self._suites.get(task.id, ({}, Suite()))
        if columns is not task.columns:
            try:
                suite = suite_of(task.columns)
            except (ValueError, SyntaxError, KeyError, TypeError, AttributeError) as error:
                what = "" if type(error) is ValueError else f"its tests cannot be read: {type(error).__name__}: "
                raise DataError(f"task {task.id}: {what}{error}") from error
            if not suite.size:
                raise DataError(f"task {task.id}: it has no tests, which every program would pass; leave the row out")
            self._suites[task.id] = (task.columns, suite)
        return suite

    # ---------------------------------------------------------------------------------- the three forms

    async def _by_streams(self, suite: Suite, program: str) -> _Verdict:
        passed: list[bool] = []
        ended = ProgramOutcome(status=Status.FINISHED)
        for given, wanted in suite.streams:
            outcome = await self._sandbox.run(program, stdin=given.encode(), limits=self._limits)
            if outcome.status is Status.MACHINERY:
                return _Verdict((), Status.MACHINERY, outcome.note)
            right = outcome.status is Status.FINISHED and same_output(wanted, outcome.stdout, self._tolerance)
            ended = outcome if ended.status is Status.FINISHED else ended
            passed.append(right)
            if not right and not self._partial:
                break
        return _Verdict(_filled(passed, suite.size), ended.status, _last_line(ended))

    async def _by_calls(self, suite: Suite, program: str) -> _Verdict:
        if suite.literal:  # a value, no expression: one could hold the function that is asked about, and call it
            asked = [{"call": f"__import__('ast').literal_eval({program!r})"}]
        else:
            asked = [*_sources(suite, program), *({"call": call} for call, _ in suite.calls)]
        lines = "".join(json.dumps(frame) + "\n" for frame in asked)
        outcome = await self._sandbox.run(ANSWERS, stdin=lines.encode(), limits=self._limits)
        if outcome.status is Status.MACHINERY:
            return _Verdict((), Status.MACHINERY, outcome.note)
        replies = [_read(line) for line in outcome.stdout.splitlines()]
        raised = next((reply for reply in replies if "raised" in reply), None)
        given = replies[len(asked) - suite.size :]
        passed = [
            _fits(wanted, reply, self._tolerance, suite.tuples)
            for (_, wanted), reply in zip(suite.calls, given, strict=False)
        ]
        return _Verdict(_filled(passed, suite.size), outcome.status, _why(raised) or _last_line(outcome))

    async def _by_scripts(self, suite: Suite, program: str) -> _Verdict:
        """The tests' process asks, the solution's process answers, and all that passes between them passes here."""
        async with AsyncExitStack() as opened:
            sides = []
            for side in (ANSWERS, TESTS):
                sides.append(await self._sandbox.open(side, limits=self._limits))
                opened.push_async_callback(sides[-1].close)
            solution, tests = sides
            left = {solution: self._limits.deadline_s, tests: 2 * self._limits.deadline_s}

            async def ask(session: ProgramSession, frame: Mapping[str, Any]) -> tuple[Status, dict[str, Any], str]:
                said = await session.ask(json.dumps(frame), deadline_s=left[session])
                left[session] -= said.wall_s
                late = left[session] <= 0 and said.status is Status.FINISHED
                return Status.TIMEOUT if late else said.status, _read(said.stdout), said.note

            ended, reply, why = Status.FINISHED, dict[str, Any](), ""
            for frame in _sources(suite, program):
                if ended is Status.FINISHED:
                    ended, reply, why = await ask(solution, frame)
            why = why or _why(reply)
            setup = {"setup": f"{suite.before}\n{suite.after}", "entry": suite.entry, "tests": suite.scripts}
            status, asked, note = await ask(tests, setup)
            while status is Status.FINISHED and "arguments" in asked:
                reply = {"raised": "Exception"}
                if ended is Status.FINISHED:
                    ended, reply, _ = await ask(solution, {"entry": suite.entry, "arguments": asked["arguments"]})
                    why = why or _why(reply)
                status, asked, note = await ask(tests, reply or {"raised": "Exception"})
        if Status.MACHINERY in (status, ended):
            return _Verdict((), Status.MACHINERY, note or why)
        if status is not Status.FINISHED and ended is Status.FINISHED:
            ended, why = status, "the tests did not end"
        passed = [each is True for each in asked.get("passed", ())] if status is Status.FINISHED else []
        return _Verdict(_filled(passed, suite.size), ended, why)


# ------------------------------------------------------------------------------------------ what was answered


def program_of(text: str) -> str:
    """What follows the thinking: inside the last `<answer>`, the last block of code; all of it where there is none."""
    spoken = after_thinking(text)
    spoken = next(reversed(_TAGGED.findall(spoken)), spoken)
    blocks = _BLOCK.findall(spoken)
    return blocks[-1] if blocks else spoken


def expression(text: str) -> str:
    """A Python expression as the answer: marked, in `[ANSWER]` tags, in code, or all of it; `f(x) == y` is y."""
    spoken = after_thinking(text).partition("[/ANSWER]")[0].rpartition("[ANSWER]")[2]
    found = marked_answer(spoken) or program_of(spoken)
    return found.strip().strip("`").rpartition(" == ")[2].strip()


def same(wanted: Any, given: Any, tolerance: float = 0.0, *, tuples: bool = True) -> bool:
    """Whether two packed values are equal and of the same types: True is not 1, but 1 is 1.0; NaN equals nothing."""
    if not tuples and isinstance(given, dict) and "tuple" in given:
        given = given["tuple"]
    if isinstance(wanted, list) and isinstance(given, list):
        pairs = zip(wanted, given, strict=False)
        return len(wanted) == len(given) and all(same(w, g, tolerance, tuples=tuples) for w, g in pairs)
    if isinstance(wanted, dict) and isinstance(given, dict) and len(given) == 1:
        (kind, left), (other, right) = *wanted.items(), *given.items()
        if kind in ("set", "frozenset", "dict") and isinstance(right, list):
            left, right = sorted(left, key=_order), sorted(right, key=_order)
        return kind == other and kind != "unknown" and same(left, right, tolerance, tuples=tuples)
    if type(wanted) in (int, float) and type(given) in (int, float):
        return wanted == given or (tolerance > 0 and math.isclose(wanted, given, rel_tol=tolerance, abs_tol=tolerance))
    return type(wanted) is type(given) and wanted == given


def same_output(wanted: str, given: str, tolerance: float = 0.0) -> bool:
    """Whether the words are the same, in order; numbers within the tolerance, where there is one."""
    left, right = ([_number(word) if tolerance else word for word in text.split()] for text in (wanted, given))
    return same(left, right, tolerance)


def _number(word: str) -> str | float:
    try:
        return float(word)
    except ValueError:
        return word


def _order(item: Any) -> str:
    """An order in which equal values stand side by side."""
    return json.dumps(float(item) if type(item) is int and abs(item) < 1 << 53 else item)


# ------------------------------------------------------------------------------------------------- between


def _sources(suite: Suite, program: str) -> list[dict[str, Any]]:
    """What the solution's process runs before it is asked: what comes before the program, it, and what comes after."""
    parts = (f"{suite.before}\n{program}" if suite.before else program, suite.after)
    return [{"source": part, "entry": suite.entry} for part in parts if part.strip()]


def _read(line: str) -> dict[str, Any]:
    """A reply; nothing where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fits(wanted: Any, reply: Mapping[str, Any], tolerance: float, tuples: bool) -> bool:
    """Whether a reply has the value; a program may write replies that are no values at all."""
    try:
        return "value" in reply and same(wanted, reply["value"], tolerance, tuples=tuples)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False


def _filled(passed: Sequence[bool], size: int) -> tuple[bool, ...]:
    """What was not come to was not passed."""
    return (*passed[:size], *[False] * (size - len(passed)))


def _why(reply: Mapping[str, Any] | None) -> str:
    return f"{reply['raised']} in line {reply.get('line')}"[:120] if reply and "raised" in reply else ""


def _last_line(outcome: ProgramOutcome) -> str:
    return outcome.note or outcome.stderr.rstrip().rpartition("\n")[2]


def _words(verdict: _Verdict) -> str:
    how = verdict.note if verdict.status in (Status.FINISHED, Status.EXITED) else f"{verdict.status}: {verdict.note}"
    return "".join(c if c.isprintable() else "?" for c in (how or "a wrong value"))[:200].removesuffix(": ")
