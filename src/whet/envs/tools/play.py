"""One play with tools, and what makes them: sessions of a user's class behind the environment door.

Whose fault: a call that is not well formed, has no such tool or arguments that do not fit, or makes the tool raise, is
an observation with its status; a call that outlives its deadline or kills its process, be it later, is the policy's
fault (`PolicyFault`), as is a `user`, `turn_reward` or `state` that fails on its message; `reset` and `reward` that
raise, `whet.Broken`, lost connections and a template that died are the machinery's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from whet.config.environment import EnvironmentConfig
from whet.envs.base import Observed, Opening, Task
from whet.envs.endpoint.play import ProgramEnvironments
from whet.envs.tools.user import SimulatedUsers
from whet.errors import ConfigError, DataError, EnvironmentFailure, PolicyFault
from whet.records import Message, ToolCall
from whet.sandbox.base import JSON, Failure
from whet.sandbox.sessions import Session, Sessions

HOOK_S = 60.0
"""Seconds of `reset` and of the other methods that are no tools."""
TURN_HOOKS = frozenset({"turn_reward", "state", "user", "over"})


class ToolEnvironments:
    """Makes the plays of a recipe's environment. `make(task)` is one; close it when all are over.

    Raises `ConfigError` where the class cannot be loaded or one of its methods cannot be a tool.
    """

    def __init__(self, config: EnvironmentConfig, users: SimulatedUsers | None = None) -> None:
        """`users` of a dialogue; None: its rows have scripts."""
        assert users is not None or config.user is None, "the client of a simulated user is passed in"
        self.config = config
        self.users = SimulatedUsers() if users is None and config.kind == "dialogue" else users
        parts: list[JSON] = [[str(config.path or "builtins:object"), config.options]]
        arguments: list[JSON] = [[*parts, *(list(tool.part) for tool in config.tools)]]
        self.sessions = Sessions(
            "whet.envs.tools.worker:load", arguments=arguments, most=config.processes, python=config.python
        )
        described = self.sessions.once({"do": "describe", "with": {}}, HOOK_S)
        answer: Any = described.value
        if described.failure is not None or "value" not in answer:
            self.close()
            raise ConfigError(f"environment: {described.failure.message if described.failure else answer['broken']}")
        facts = answer["value"]
        self.tools: tuple[dict[str, Any], ...] = tuple(facts["tools"])
        self.hooks = frozenset(facts["hooks"])
        self.takes: list[str] | None = facts["takes"]
        self.needs: list[str] = facts["needs"]
        self.system: str | None = facts["about"] if config.system == "docstring" else None
        if isinstance(config.system, Path):
            self.system = _policy(config.system)
        if self.users is None and not self.tools and "user" not in self.hooks:
            self.close()
            raise ConfigError(f"environment: {facts['name']} has no tool (a public method) and no user method")

    def make(self, task: Task) -> Play:
        """One play of a task."""
        return Play(task=task, made=self)

    def check(self, task: Task) -> None:
        """Raise `DataError` where a task lacks a column that `reset` needs."""
        lacking = [name for name in self.needs if name not in task.columns]
        if lacking:
            has = ", ".join(sorted(task.columns)) or "none"
            raise DataError(f"task {task.id}: reset needs the column {lacking[0]!r}; the row's columns: {has}")
        if self.users is not None:
            self.users.check(task)

    def close(self) -> None:
        """End every process. May be called twice."""
        self.sessions.close()
        if self.users is not None:
            self.users.close()


class OwnEnvironments:
    """Makes plays of a class of the environment door that was given from Python: they are in this process.

    Raises `ConfigError` where it is no such class.
    """

    tools: tuple[dict[str, Any], ...] = ()

    def __init__(self, config: EnvironmentConfig) -> None:
        made = config.path
        assert callable(made), "a path is played in processes of its own"
        missing = [method for method in ("start", "step") if isinstance(made, type) and not hasattr(made, method)]
        if missing or config.tools or config.system:
            why = f"has no method {missing[0]}" if missing else "takes no tools and no system"
            raise ConfigError(
                f"environment: {getattr(made, '__name__', made)} {why}; a class whose methods are tools is given by "
                "its file (file.py:Class)"
            )
        self.config, self.hooks = config, frozenset({"state"})
        self.make = partial(made, **config.options)

    def check(self, task: Task) -> None:
        """Its class knows which columns it needs."""

    def close(self) -> None:
        """Nothing to end."""


Environments = ToolEnvironments | OwnEnvironments | ProgramEnvironments


@dataclass(kw_only=True, slots=True)
class Play:
    """`Environment` over one session."""

    task: Task
    made: ToolEnvironments
    session: Session | None = None
    calls: int = 0
    spent_s: float = 0.0
    out_of_calls: bool = False
    failed: bool = False
    talk: list[Message] = field(default_factory=list)
    """What the user of a dialogue knows of: everything that was said."""

    async def start(self, *, seed: int) -> Opening:
        """The task's messages, with what `reset` returns."""
        opened = await self.made.sessions.open()
        if isinstance(opened, Failure):
            raise EnvironmentFailure(opened.message)
        self.session = opened
        takes, columns = self.made.takes, self.task.columns
        row = {name: value for name, value in columns.items() if takes is None or name in takes}
        found = await self._ask("reset", HOOK_S, caused=False, row=row, seed=seed)
        messages = _with_system(self.task.messages, self.made.system)
        for shown in found["shown"]:
            if isinstance(shown, str):
                messages = (*messages[:-1], replace(messages[-1], content=messages[-1].content + shown))
            else:
                messages += tuple(Message(role=each["role"], content=each["content"]) for each in shown)
        self.talk += messages
        return Opening(messages=messages, tools=self.made.tools, state=found["state"])

    async def step(self, message: Message) -> Observed:
        """The results of the message's calls in order, or what the user says."""
        was_out, results = self.out_of_calls, []
        calls = []
        for number, call in enumerate(message.tool_calls):
            done, text = await self._call(call, number)
            calls.append(done)
            results.append(Message(role="tool", content=text, tool_call_id=call.id, name=call.name or "unknown"))
        found: Mapping[str, Any] = {"reward": None, "state": None, "user": None, "over": False}
        if TURN_HOOKS & self.made.hooks:
            found = await self._ask("turn", HOOK_S, caused=True, message=message.content, calls=len(calls))
        said, users = found["user"], self.made.users
        self.talk.append(message)
        if said is None and not calls and users is not None and not found["over"]:
            said = await users.says(self.task, self.talk)
        if said is not None:
            results.append(Message(role="user", content=said))
            self.talk += results[-1:]
        over = found["over"] or not results or (bool(calls) and was_out)
        return Observed(
            messages=tuple(results), over=over, reward=found["reward"], state=found["state"], calls=tuple(calls)
        )

    async def close(self) -> Mapping[str, float]:
        """The rewards of the play by its class; the process is ended."""
        if self.session is None:
            return {}
        try:
            if self.calls and not self.failed and self.session.gone and not self.session.orphaned:
                raise PolicyFault("its process died after a call had answered")
            worth: dict[str, float] = {} if self.failed else await self._ask("end", HOOK_S, caused=False)
            return worth
        finally:
            self.session.close()

    async def _call(self, call: ToolCall, number: int) -> tuple[ToolCall, str]:
        """The call with its status, and the text that the policy sees."""
        limits = self.made.config.limits
        if number >= limits.calls_per_turn:
            call = replace(call, status="over_limit", error=f"at most {limits.calls_per_turn} calls in a turn")
        if limits.calls is not None and self.calls >= limits.calls:
            self.out_of_calls = True
            call = replace(call, status="over_limit", error="no calls left; answer now")
        self.calls += 1
        if call.status == "ok":
            left_s = min(limits.call_s, limits.episode_s - self.spent_s)
            assert self.session is not None, "started"
            found = await self._ask("call", left_s, caused=True, name=call.name, arguments=dict(call.arguments))
            self.spent_s += self.session.answered_s
            if found["status"] == "ok":
                return call, found["text"]
            call = replace(call, status=found["status"], error=found["error"])
        return call, f"error: {call.error}"

    async def _ask(self, what: str, deadline_s: float, *, caused: bool, **given: Any) -> Any:
        """What one method answers. `caused`: by the policy's message, so that a failure is the policy's fault."""
        assert self.session is not None, "started"
        result = await self.session.ask({"do": what, "with": given}, deadline_s)
        answer: Any = result.value
        if result.failure is None and "value" in answer:
            return answer["value"]
        self.failed = True
        why = f"{given.get('name', what)}: {answer['broken'] if result.failure is None else result.failure.message}"
        machinery = result.failure is None or self.session.orphaned or not caused
        raise EnvironmentFailure(why) if machinery else PolicyFault(why)


def _policy(path: Path) -> str:
    """The text of a file. Raises `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"environment.system: {path}: cannot be read ({error}); name a text file") from error


def _with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    if system is None or messages[0].role == "system":
        return tuple(messages)
    return (Message(role="system", content=system), *messages)
