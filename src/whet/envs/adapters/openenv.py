"""Environments of OpenEnv (0.10): a server that runs is asked over its WebSocket, one connection for each play.

A server of MCP tools offers these; any other one has a single tool, `act`, with the schema of its actions, or takes
what the policy says as the action's field `text`. Regular pings are off: a play waits for the policy longer than
servers wait. A silent server is sent one: steps run in threads of their own, so a server that lives answers pings
during a step that hangs, which is what the policy's action did.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, ClassVar
from urllib.request import urlopen

from whet.envs.tools.schema import RemoteTool
from whet.errors import EnvironmentFailure
from whet.target import TargetError, describe

NOT_SHOWN = ("reward", "done", "metadata")
REFUSED = ("VALIDATION_ERROR", "EXECUTION_ERROR")
"""Errors of an action; the others are the server's."""
ANSWER_S = 60.0
SILENT_S, PONG_S = 2.0, 2.0
"""After how long without an answer a ping is sent, and how long its answer may take."""


class OpenEnv:
    """An environment whose state is a server's."""

    _url: ClassVar[str]
    _field: ClassVar[str | None]
    _schema: ClassVar[Mapping[str, Any]]
    _client: ClassVar[Any]

    @classmethod
    def load(cls, url: str, text: str | None = None) -> None:
        """`url`: http://HOST:PORT; `text`: the field of an action that is what the policy says."""
        try:
            from websockets.sync import client
        except ImportError as error:
            raise TargetError("kind: openenv needs websockets where it runs; pip install websockets") from error
        cls._url, cls._field, cls._client = url.rstrip("/"), text, client
        cls._schema = _got(f"{cls._url}/schema")["action"]

    def __init__(self) -> None:
        self._ids = count(1)
        try:
            where = f"{self._url.replace('http', 'ws', 1)}/ws"
            self._socket = self._client.connect(where, ping_interval=None, max_size=None)
        except Exception as error:
            raise EnvironmentFailure(f"OpenEnv {self._url}: cannot be reached ({describe(error)})") from error
        self._earned, self._done = 0.0, False
        self._turn: float | None = None

    def offered(self) -> list[RemoteTool]:
        """Its MCP tools, or one that acts; none where the policy's words are the action."""
        if self._field is not None:
            return []
        listed = self._asked("mcp", {"jsonrpc": "2.0", "id": next(self._ids), "method": "tools/list", "params": {}})
        tools = (listed.get("result") or {}).get("tools")
        if tools is not None:
            return [
                RemoteTool.of(partial(self._call, t["name"]), t["name"], t["description"], _input(t)) for t in tools
            ]
        shown = {name: about for name, about in self._schema["properties"].items() if name != "metadata"}
        parameters = {**self._schema, "properties": shown}
        return [RemoteTool.of(self._act, "act", self._schema.get("description", "Act."), parameters)]

    def reset(self, **row: Any) -> str:
        """Begin; a server takes of the row what its reset names."""
        shown = self._shown(self._asked("reset", {"seed": random.getrandbits(31), **row}))
        return f"\n\n{shown}" if shown else ""

    def user(self, message: str) -> str | None:
        """Where the policy's words are the action: what follows them."""
        if self._field is None or self._done:
            return None
        try:
            return self._act(**{self._field: message})
        except ValueError as error:
            return f"error: {error}"

    def turn_reward(self) -> float | None:
        """The sum of its steps' rewards in this turn."""
        turn, self._turn = self._turn, None
        return turn

    def over(self) -> bool:
        """Whether it said that it is done."""
        return self._done

    def reward(self) -> float:
        """The sum of its steps' rewards."""
        return self._earned

    def close(self) -> None:
        """End the session, unless the server has; what the play was worth is known."""
        with suppress(Exception):
            self._socket.send(json.dumps({"type": "close"}))
            self._socket.close()

    def _call(self, tool: str, /, **arguments: Any) -> str:
        return self._act(type="call_tool", tool_name=tool, arguments=arguments)

    def _act(self, **action: Any) -> str:
        if self._done:
            raise ValueError("the episode is over")
        return self._shown(self._asked("step", action))

    def _shown(self, answer: Mapping[str, Any]) -> str:
        """The observation as text; what it was worth is noted."""
        self._done = bool(answer.get("done"))
        if (reward := answer.get("reward")) is not None:
            self._earned, self._turn = self._earned + reward, (self._turn or 0.0) + reward
        observed = {key: value for key, value in answer["observation"].items() if key not in NOT_SHOWN}
        if "tool_name" in observed:
            if observed.get("error"):
                raise ValueError(observed["error"].get("message", str(observed["error"])))
            observed = observed["result"]
            if isinstance(observed, dict) and "content" in observed:
                text = "\n".join(part.get("text", f"[{part.get('type')}]") for part in observed["content"])
                if observed.get("is_error"):
                    raise ValueError(text)
                return text
            return observed if isinstance(observed, str) else json.dumps(observed, ensure_ascii=False)
        (only, *others) = observed.values() or ("",)
        return only if isinstance(only, str) and not others else json.dumps(observed, ensure_ascii=False)

    def _asked(self, kind: str, data: Mapping[str, Any]) -> Any:
        """What the server answers. Raises `ValueError` for what it refuses, `EnvironmentFailure` where it is gone."""
        try:
            self._socket.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(self._received())
        except Exception as error:
            raise EnvironmentFailure(f"OpenEnv {self._url}: {describe(error)}") from error
        if answer["type"] == "error":
            said = answer["data"]
            if said.get("code") in REFUSED:
                raise ValueError(said["message"])
            raise EnvironmentFailure(f"OpenEnv {self._url}: {said.get('code')}: {said['message']}")
        return answer["data"]

    def _received(self) -> Any:
        """The next message, however long it takes (the deadline of a call kills the play), of a server that lives."""
        while True:
            try:
                return self._socket.recv(timeout=SILENT_S)
            except TimeoutError:
                if not self._socket.ping().wait(PONG_S):
                    raise OSError(f"no answer for {SILENT_S:g} s, and none to a ping for {PONG_S:g} s") from None


def _input(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = tool.get("inputSchema") or tool.get("input_schema") or {"type": "object"}
    return schema


def _got(url: str) -> Any:
    try:
        with urlopen(url, timeout=ANSWER_S) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise TargetError(f"{url}: no OpenEnv server answers there ({error})") from error
