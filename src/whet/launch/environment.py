"""`whet env`: what an environment of tools is, and a play written by hand, twice, each in its own process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from whet.config.environment import EnvironmentConfig
from whet.envs.base import Task
from whet.envs.tools.play import ToolEnvironments
from whet.errors import ConfigError, EnvironmentFailure, PolicyFault
from whet.files import write_atomic
from whet.records import Message, ToolCall
from whet.sampling.base import run
from whet.sandbox.sessions import Sessions

ROWS_S = 600.0
CALL = re.compile(r"(\w+)=(\{.*\})", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What is known of an environment."""

    tools: tuple[dict[str, Any], ...]
    hooks: tuple[str, ...]
    columns: str
    """Those that `reset` takes, in words."""
    load_ms: float
    play_ms: float = 0.0
    """Of the second play."""
    play: tuple[str, ...] = ()
    """The first play, line by line."""
    same: bool = True
    """Whether the second went the same way."""


def try_environment(path: str, options: str, row: str, turns: Sequence[str], prompt: str) -> Looked:
    """Load `FILE:CLASS` with its options, or a section of a recipe, and where there are turns play them.

    Raises `ConfigError`.

    A turn is `TOOL={"argument": value}`, or what the policy says.
    """
    began, columns = time.monotonic(), mapping("--row", row)
    with closing(ToolEnvironments(section_of(path, mapping("--options", options)))) as made:
        takes = "all" if made.takes is None else ", ".join(made.takes) or "none"
        load_ms = 1000 * (time.monotonic() - began)
        looked = Looked(tools=made.tools, hooks=tuple(sorted(made.hooks)), columns=takes, load_ms=load_ms)
        if not turns:
            return looked
        task = Task(id="by hand", messages=(Message(role="user", content=prompt),), columns=columns)
        made.check(task)
        first = run(_play(made, task, [_turn(text) for text in turns]))
        began = time.monotonic()
        second = run(_play(made, task, [_turn(text) for text in turns]))
        return replace(looked, play=tuple(first), same=first == second, play_ms=1000 * (time.monotonic() - began))


def write_rows(path: str, options: str, file: Path) -> int:
    """Write the tasks of an environment's class as JSON lines, and say how many. Raises `ConfigError`."""
    section = section_of(path, mapping("--options", options), played=False)
    sessions = Sessions(
        "whet.envs.tools.worker:rows", arguments=[str(section.path), section.options], most=1, python=section.python
    )
    with closing(sessions):
        listed: Any = sessions.once({}, ROWS_S)
    if listed.failure is not None:
        raise ConfigError(f"environment: {listed.failure.message}")
    write_atomic(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in listed.value).encode())
    return len(listed.value)


async def _play(made: ToolEnvironments, task: Task, turns: Sequence[Message]) -> list[str]:
    """What was shown, said, observed and rewarded."""
    play, lines = made.make(task), list[str]()
    try:
        opening = await play.start(seed=0)
        lines += [f"{message.role}: {message.content}" for message in opening.messages]
        for turn in turns:
            observed = await play.step(turn)
            calls = (f"{call.name} {dict(call.arguments)} [{call.status}]" for call in observed.calls)
            lines.append(f"assistant: {' '.join([turn.content, *calls]).strip()}")
            lines += [f"{message.role}: {message.content}" for message in observed.messages]
            lines.append(f"(reward {observed.reward}, state {observed.state})")
            if observed.over:
                break
        lines.append(f"(worth {dict(await play.close())})")
    except (EnvironmentFailure, PolicyFault) as error:
        lines.append(f"(broke off by the {'policy' if isinstance(error, PolicyFault) else 'machinery'}: {error})")
        await play.close()
    return lines


def _turn(text: str) -> Message:
    found = CALL.fullmatch(text.strip())
    if found is None:
        return Message(role="assistant", content=text)
    call = ToolCall(name=found[1], arguments=mapping("--turn", found[2]), id="call00000")
    return Message(role="assistant", content="", tool_calls=(call,))


def section_of(text: str, options: Mapping[str, Any] | None = None, *, played: bool = True) -> EnvironmentConfig:
    """`FILE:CLASS`, or `{kind: sql, database: shop.sqlite}` as in a recipe; `played` by hand. Raises `ConfigError`."""
    given = mapping("environment", text) if text.startswith("{") else {"path": text}
    try:
        found = EnvironmentConfig.model_validate({**given, **({"options": options} if options else {})})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"environment: {place}{': ' if place else ''}{first['msg']}") from error
    if played and (found.kind == "endpoint" or found.user is not None):
        raise ConfigError("environment: plays of programs and of simulated users that are models need a run")
    return found


def mapping(name: str, text: str) -> dict[str, Any]:
    """An object that was typed as JSON or YAML. Raises `ConfigError` with the option's name."""
    try:
        value = yaml.safe_load(text or "{}")
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} {text}: not YAML or JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} {text}: is {type(value).__name__}; write an object: {{key: value}}")
    return value
