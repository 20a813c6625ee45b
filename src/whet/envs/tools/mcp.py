"""The tools of an MCP server, through the official client: a server of the play's own, or one that all plays share.

A call that the server refuses is the policy's observation; a lost server is the machinery's failure.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from whet.envs.tools.schema import RemoteTool
from whet.errors import EnvironmentFailure
from whet.target import TargetError, describe

CLOSE_S = 2.0
"""Longest wait for a server to close; then it is killed with the play."""
TETHERED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
"""Starts a command that is killed when the process that started it is: servers are in a session of their own."""


class MCP:
    """An environment whose tools are those of a server."""

    _mcp: ClassVar[Any]
    _command: ClassVar[Sequence[str]]
    _url: ClassVar[str]
    _only: ClassVar[Sequence[str] | None]

    @classmethod
    def load(cls, command: Sequence[str], url: str, only: Sequence[str] | None) -> None:
        """Import the client. Raises `TargetError` where it is not installed."""
        try:
            import mcp
            import mcp.client.stdio
        except ImportError as error:
            raise TargetError("the tools of an MCP server need mcp; pip install 'whet[mcp]'") from error
        cls._mcp, cls._command, cls._url, cls._only = mcp, command, url, only

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        begun: asyncio.Future[Any] = self._loop.create_future()
        self._connected = self._loop.create_task(self._connect(begun))
        try:
            self._client = self._loop.run_until_complete(begun)
        except Exception as error:
            raise EnvironmentFailure(f"MCP {self._where()}: cannot be reached ({describe(error)})") from error

    def offered(self) -> list[RemoteTool]:
        """Those of the server that are wanted. Raises `TargetError` for a wanted one that it has not."""
        found = {each.name: each for each in self._asked(self._client.list_tools()).tools}
        lacking = [name for name in self._only or () if name not in found]
        if lacking:
            raise TargetError(f"MCP {self._where()} has no tool {lacking[0]!r}; it has {', '.join(found)}")
        return [self._tool(found[name]) for name in (found if self._only is None else self._only)]

    def close(self) -> None:
        """Close the connection."""
        self._over.set()
        with suppress(Exception):
            self._loop.run_until_complete(asyncio.wait_for(self._connected, CLOSE_S))

    def _tool(self, listed: Any) -> RemoteTool:
        call = partial(self._call, listed.name)
        return RemoteTool.of(call, listed.name, listed.description or "", listed.input_schema)

    def _call(self, name: str, /, **given: Any) -> str:
        result = self._asked(self._client.call_tool(name, given))
        text = "\n".join(getattr(each, "text", f"[{each.type}]") for each in result.content)
        if result.is_error:
            raise ValueError(text)
        return text

    def _asked(self, request: Any) -> Any:
        """Its answer. Raises `EnvironmentFailure` where there is none; what the server refuses, `ValueError`."""
        try:
            return self._loop.run_until_complete(request)
        except self._mcp.MCPError as error:
            if self._connected.done() or error.error.code == self._mcp.types.CONNECTION_CLOSED:
                raise EnvironmentFailure(f"MCP {self._where()}: is gone ({error})") from error
            raise ValueError(str(error)) from error
        except Exception as error:
            raise EnvironmentFailure(f"MCP {self._where()}: {describe(error)}") from error

    async def _connect(self, begun: asyncio.Future[Any]) -> None:
        """Hold the connection in one task until it is over."""
        server: Any = self._url
        if self._command:
            asked = self._mcp.StdioServerParameters(command=sys.executable, args=["-c", TETHERED, *self._command])
            server = self._mcp.client.stdio.stdio_client(asked)
        try:
            async with self._mcp.Client(server) as client:
                begun.set_result(client)
                await self._over.wait()
        except BaseException as error:
            if not begun.done():
                begun.set_exception(error)
            raise

    def _where(self) -> str:
        return self._url or " ".join(self._command)
