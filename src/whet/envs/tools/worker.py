"""The process of one play: a user's class, its tools, and the rewards that it gives.

`load` runs in the template process, once; every play is a fork of that, so what a play does to globals and to its own
children is gone with it. Standard output is the parent's to read, never a protocol. Standard library only, but for what
reads hints: it also runs in the interpreter of another environment.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from whet.envs.tools.schema import NAMED, Offers, RemoteTool, Tool, as_tool
from whet.errors import EnvironmentFailure
from whet.target import TargetError, describe, load_function

HOOKS = frozenset(
    {"load", "rows", "reset", "reward", "get_reward", "turn_reward", "state", "user", "over", "close", "offered"}
)
"""Methods of a class that are not tools."""
HARMLESS = ("tqdm_monitor",)
"""Threads without which nothing is amiss: it redraws progress bars."""
LONGEST = 200_000
"""Characters of a result that leave the process; what is longer has its middle left out."""


def load(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> Callable[[Mapping[str, Any]], Any]:
    """The function that answers payloads. Parts are classes and functions, each with what it is given.

    A class with a `load` is given it there, else where it is made. Raises `TargetError` where a thread was left
    running: plays are forked, and a thread is not.
    """
    classes: list[Callable[[], Any]] = []
    functions: list[Callable[..., Any]] = []
    for number, (path, options) in enumerate(parts):
        made = load_function(path)
        if number and not isinstance(made, type):
            functions.append(made)
            continue
        loaded = getattr(made, "load", None)
        if callable(loaded):
            loaded(**options)
        classes.append(made if callable(loaded) else partial(made, **options))
    with suppress(TargetError):  # where nothing reads hints, tools are refused in the play
        as_tool("shown", shown)  # imports and warms what reads hints once, not in every fork
    others = {thread.name for thread in threading.enumerate()} - {threading.main_thread().name, *HARMLESS}
    if others:
        raise TargetError(
            f"load left threads running ({', '.join(sorted(others))[:200]}), and plays are forked without them; start "
            "them in reset, or end them in load"
        )
    play: _Play | None = None

    def answer(payload: Mapping[str, Any]) -> Any:
        nonlocal play
        try:
            if play is None:
                play = _Play([_object(make) for make in classes], functions)
            return {"value": getattr(play, payload["do"])(**payload["with"])}
        except (EnvironmentFailure, ConnectionError) as error:
            return {"broken": describe(error)}

    return answer


def rows(path: str, options: Mapping[str, Any]) -> Callable[[Any], list[Any]]:
    """The function that answers with the tasks that a class has. Raises `TargetError` where it has none."""
    listed = getattr(load_function(path), "rows", None)
    if not callable(listed):
        raise TargetError(f"{path} lists no tasks: it has no class method rows")
    return lambda _: list(listed(**options))


def _object(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except TypeError as error:
        remedy = "it is made with environment.options; the columns of a row are for reset(self, **columns)"
        raise TargetError(f"{describe(error)}; {remedy}") from error


class _Play:
    """An object of each class. The first one is the user's own, the others are tools."""

    def __init__(self, parts: Sequence[Any], functions: Sequence[Callable[..., Any]]) -> None:
        self._parts = parts
        self._tools: dict[str, Tool | RemoteTool] = {}
        listed: list[Tool | RemoteTool] = [as_tool(each.__name__, each) for part in parts for each in _methods(part)]
        listed += [as_tool(each.__name__, each) for each in functions]
        for tool in [*listed, *(tool for part in parts if isinstance(part, Offers) for tool in part.offered())]:
            if tool.name in self._tools:
                raise TargetError(f"two tools are named {tool.name}; rename one")
            self._tools[tool.name] = tool

    def describe(self) -> dict[str, Any]:
        """Schemas of the tools, which hooks there are, and the columns that `reset` takes (None: all) and needs."""
        own = self._parts[0]
        given = [p for part in self._parts for p in _parameters(part)]
        named = [p for p in given if p.kind in NAMED]
        anything = any(p.kind is p.VAR_KEYWORD for p in given)
        hooks = {name for part in self._parts for name in HOOKS if hasattr(part, name)}
        return {
            "tools": [tool.schema for tool in self._tools.values()],
            "hooks": sorted(hooks),
            "takes": None if anything else [p.name for p in named],
            "needs": [p.name for p in named if p.default is p.empty],
            "about": inspect.getdoc(type(own)) if type(own) is not object else None,
            "name": type(own).__name__,
        }

    def reset(self, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Begin; `shown` is what each `reset` returned: text or messages."""
        random.seed(seed)
        told = []
        for part in self._parts:
            given = _parameters(part)
            everything = any(p.kind is p.VAR_KEYWORD for p in given)
            names = row.keys() if everything else row.keys() & {p.name for p in given}
            shown = _told(part, "reset", **{name: row[name] for name in names})
            if not (shown is None or isinstance(shown, str) or _are_messages(shown)):
                raise TypeError(f"reset returned {type(shown).__name__}; return text, a list of messages or None")
            told += [] if shown is None else [shown]
        return {"shown": told, "state": self._state()}

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
        said = None if calls else _told(self._parts[0], "user", message)
        rewards = [_number("turn_reward", _told(part, "turn_reward")) for part in self._parts]
        known = [reward for reward in rewards if reward is not None]
        return {
            "reward": sum(known) if known else None,
            "state": self._state(),
            "user": None if said is None else str(said),
            "over": any(_told(part, "over") for part in self._parts),
        }

    def end(self) -> dict[str, float]:
        """What the play was worth, by name; then `close`."""
        worth: dict[str, float] = {}
        for part in self._parts:
            name = "reward" if hasattr(part, "reward") else "get_reward"
            value = _told(part, name) if _hook(part, name) else getattr(part, name, None)
            named = value if isinstance(value, Mapping) else {} if value is None else {"reward": value}
            for key, one in named.items():
                if (number := _number("reward", one)) is not None:
                    worth[str(key)] = worth.get(str(key), 0.0) + number
        for part in self._parts:
            _told(part, "close")
        return worth

    def _state(self) -> str | None:
        states = [repr(_told(part, "state")) for part in self._parts if _hook(part, "state")]
        return "; ".join(states) or None


def _told(part: Any, method: str, /, *given: Any, **named: Any) -> Any:
    """The result of a method of a part; None where it has no such method."""
    hook = _hook(part, method)
    return None if hook is None else _awaited(hook(*given, **named))


def _hook(part: Any, name: str) -> Callable[..., Any] | None:
    found = getattr(part, name, None)
    return found if callable(found) else None


def _parameters(part: Any) -> list[inspect.Parameter]:
    """What its `reset` takes."""
    reset = _hook(part, "reset")
    return [] if reset is None else list(inspect.signature(reset).parameters.values())


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
