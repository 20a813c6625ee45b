"""`whet env`: what an environment of tools is, and a play written by hand, twice, each in its own process."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from whet.config.environment import ClassEnvironment, EnvironmentConfig, LimitsConfig
from whet.envs.base import Task
from whet.envs.tools.play import ToolEnvironments
from whet.errors import ConfigError, EnvironmentFailure, PolicyFault
from whet.records import Message, ToolCall
from whet.sampling.bridge import run

CALL = re.compile(r"([A-Za-z_]\w*)=(\{.*\})", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One play."""

    messages: tuple[Message, ...]
    """What was shown, said and observed."""
    rewards: tuple[float | None, ...]
    """Of turns."""
    states: tuple[str | None, ...]
    worth: Mapping[str, float]
    failure: str
    """Why it broke off; empty: it did not."""
    start_ms: float
    turn_ms: float
    """Of a turn, in the mean."""

    def same(self, other: Tried) -> bool:
        """Whether two plays went the same way."""
        seen = [(each.messages, each.rewards, each.states, each.worth, each.failure) for each in (self, other)]
        return seen[0] == seen[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What is known of an environment."""

    tools: tuple[dict[str, Any], ...]
    hooks: tuple[str, ...]
    columns: str
    """Those that `reset` takes, in words."""
    load_ms: float
    first: Tried | None = None
    second: Tried | None = None


def try_environment(path: str, options: str, row: str, turns: Sequence[str], prompt: str) -> Looked:
    """Load `FILE:CLASS` with its options, and where there are turns or a row play it. Raises `ConfigError`.

    A turn is `TOOL={"argument": value}` (several in one turn: one on each line), or what the policy says.
    """
    given, columns = mapping("--options", options), mapping("--row", row)
    config: EnvironmentConfig = ClassEnvironment(
        kind="class", path=path, options=given, limits=LimitsConfig(turns=max(1, len(turns)))
    )
    began = time.monotonic()
    made = ToolEnvironments(config)
    try:
        looked = Looked(
            tools=made.tools,
            hooks=tuple(sorted(made.hooks)),
            columns="all" if made.takes is None else ", ".join(made.takes) or "none",
            load_ms=1000 * (time.monotonic() - began),
        )
        if not turns and not row:
            return looked
        task = Task(id="by hand", messages=(Message(role="user", content=prompt),), columns=columns)
        made.check(task)
        first, second = (run(_play(made, task, [_turn(text) for text in turns])) for _ in range(2))
        return replace(looked, first=first, second=second)
    finally:
        made.close()


async def _play(made: ToolEnvironments, task: Task, turns: Sequence[Message]) -> Tried:
    play, messages, rewards, states = made.make(task), list[Message](), list[float | None](), list[str | None]()
    began, started, failure = time.monotonic(), 0.0, ""
    try:
        opening = await play.start(seed=0)
        started = time.monotonic()
        messages += opening.messages
        states.append(opening.state)
        for turn in turns:
            observed = await play.step(turn)
            messages += [Message(role=turn.role, content=turn.content, tool_calls=observed.calls), *observed.messages]
            rewards.append(observed.reward)
            states.append(observed.state)
            if observed.over:
                break
    except (EnvironmentFailure, PolicyFault) as error:
        failure = f"{'machinery' if isinstance(error, EnvironmentFailure) else 'policy'}: {error}"
    ended = time.monotonic()
    worth: Mapping[str, float] = {}
    try:
        worth = await play.close()
    except EnvironmentFailure as error:
        failure = failure or f"machinery: {error}"
    return Tried(
        messages=tuple(messages),
        rewards=tuple(rewards),
        states=tuple(states),
        worth=worth,
        failure=failure,
        start_ms=1000 * (started - began),
        turn_ms=1000 * (ended - started) / max(1, len(rewards)),
    )


def _turn(text: str) -> Message:
    found = [CALL.fullmatch(line.strip()) for line in text.splitlines() or [""]]
    calls = [
        ToolCall(name=each[1], arguments=mapping("--turn", each[2]), id=f"call{n:05}")
        for n, each in enumerate(found)
        if each
    ]
    if len(calls) < len(found):
        return Message(role="assistant", content=text)
    return Message(role="assistant", content="", tool_calls=tuple(calls))


def mapping(name: str, text: str) -> dict[str, Any]:
    """An object that was typed as JSON or YAML. Raises `ConfigError` with the option's name."""
    try:
        value = yaml.safe_load(text or "{}")
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} {text}: not YAML or JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} {text}: is {type(value).__name__}; write an object: {{key: value}}")
    return value
