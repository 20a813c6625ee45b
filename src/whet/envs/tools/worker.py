"""The process of one play: a user's class, its tools, and what it says of the play.

`load` runs in the template process, once; every play is a fork of that, so what a play does to globals and to its own
children is gone with it. Standard output is the parent's to read, never a protocol.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whet.envs.tools.schema import Tool, as_tool
from whet.errors import EnvironmentFailure
from whet.target import TargetError, describe, load_function

HOOKS = frozenset({"load", "reset", "reward", "get_reward", "turn_reward", "state", "user", "close"})
"""Methods of a class that are not tools."""
LONGEST = 200_000
"""Characters of a result that leave the process; what is longer has its middle left out."""


def load(path: str, options: Mapping[str, Any], tools: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    """The function that answers payloads. A class with a `load` is given the options there, else where it is made."""
    made: Callable[..., Any] = load_function(path) if path else object
    loaded = getattr(made, "load", None)
    if callable(loaded):
        loaded(**options)
        options = {}
    functions = [load_function(each) for each in tools]
    play: _Play | None = None

    def answer(payload: Mapping[str, Any]) -> Any:
        nonlocal play
        if play is None:
            play = _Play(made(**options), functions)
        try:
            return {"value": getattr(play, payload["do"])(**payload["with"])}
        except (EnvironmentFailure, ConnectionError) as error:
            return {"broken": describe(error)}

    return answer


class _Play:
    """One object of the user's class."""

    def __init__(self, environment: Any, functions: Sequence[Callable[..., Any]]) -> None:
        self._environment = environment
        self._tools: dict[str, Tool] = {}
        for function in [*_methods(environment), *functions]:
            name = function.__name__
            if name in self._tools:
                raise TargetError(f"two tools are named {name}; rename one")
            self._tools[name] = as_tool(name, function)
        if not self._tools and self._hook("user") is None:
            raise TargetError(f"{type(environment).__name__} has no tool (a public method) and no user method")

    def describe(self) -> dict[str, Any]:
        """Schemas of the tools, which hooks there are, and the columns that `reset` takes (None: all) and needs."""
        reset, about = self._hook("reset"), inspect.getdoc(type(self._environment))
        given = [] if reset is None else list(inspect.signature(reset).parameters.values())
        named = [p for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        anything = any(p.kind is p.VAR_KEYWORD for p in given)
        return {
            "tools": [tool.schema for tool in self._tools.values()],
            "hooks": sorted(name for name in HOOKS if hasattr(self._environment, name)),
            "takes": None if anything else [p.name for p in named],
            "needs": [p.name for p in named if p.default is p.empty],
            "about": about if type(self._environment) is not object else None,
        }

    def reset(self, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Begin; `shown` is what `reset` returned: text, messages or None."""
        random.seed(seed)
        shown = self._ask("reset", **row)
        if not (shown is None or isinstance(shown, str) or _are_messages(shown)):
            raise TypeError(f"reset returned {type(shown).__name__}; return text, a list of messages or None")
        return {"shown": shown, "state": self._state()}

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run one tool; `status` is ok, unknown_tool, bad_arguments or raised."""
        if name not in self._tools:
            near = difflib.get_close_matches(name, self._tools, n=1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._tools) or 'none'}"
            return {"status": "unknown_tool", "error": f"there is no tool {name[:80]!r}; {known}"}
        try:
            given = self._tools[name].arguments(arguments)
        except ValueError as error:
            return {"status": "bad_arguments", "error": f"{name}: {error}"}
        try:
            return {"status": "ok", "text": shown(_awaited(self._tools[name].function(**given)))}
        except (EnvironmentFailure, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 - the policy's arguments made it raise
            return {"status": "raised", "error": f"{type(error).__name__}: {error}"[: LONGEST // 100]}

    def turn(self, message: str, calls: int) -> dict[str, Any]:
        """After a turn: its reward, the state, and where nothing was called what the user says to that."""
        said = None if calls else self._ask("user", message)
        reward = _number("turn_reward", self._ask("turn_reward"))
        return {"reward": reward, "state": self._state(), "user": None if said is None else str(said)}

    def end(self) -> dict[str, float]:
        """What the play was worth, by name; then `close`."""
        name = "reward" if hasattr(self._environment, "reward") else "get_reward"
        value = self._ask(name) if self._hook(name) else getattr(self._environment, name, None)
        parts = value if isinstance(value, Mapping) else {} if value is None else {"reward": value}
        worth = {str(name): _number("reward", part) for name, part in parts.items()}
        self._ask("close")
        return {name: part for name, part in worth.items() if part is not None}

    def _hook(self, name: str) -> Callable[..., Any] | None:
        found = getattr(self._environment, name, None)
        return found if callable(found) else None

    def _ask(self, name: str, *given: Any, **named: Any) -> Any:
        """What a method says, where the class has it."""
        hook = self._hook(name)
        return None if hook is None else _awaited(hook(*given, **named))

    def _state(self) -> str | None:
        return repr(self._ask("state")) if self._hook("state") else None


def shown(value: Any) -> str:
    """A result as text: a text as it is, else JSON, else as Python prints it; bytes and half characters are escaped."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            value = repr(value)
    if len(value) > LONGEST:
        left_out = len(value) - LONGEST
        value = f"{value[: LONGEST // 2]}\n[... {left_out:,} characters left out]\n{value[-LONGEST // 2 :]}"
    return str(value).encode("utf-8", "backslashreplace").decode()


def _methods(environment: Any) -> list[Callable[..., Any]]:
    """The public methods, in the order in which they are defined, a parent's first."""
    found = {name: value for kind in reversed(type(environment).__mro__[:-1]) for name, value in vars(kind).items()}
    names = (name for name, value in found.items() if not name.startswith("_") and inspect.isroutine(value))
    return [getattr(environment, name) for name in names if name not in HOOKS]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in value
    )


def _number(what: str, value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} returned {number}")
    return number


def _awaited(value: Any) -> Any:
    async def wait() -> Any:
        return await value

    return asyncio.run(wait()) if inspect.isawaitable(value) else value
