"""The HTTP side of serving: routes, keys, bounds and streams, with starlette on uvicorn.

Everything is bounded: the bytes of a body, the seconds in which it arrives and in which it is answered, and the
requests that are under way together. Beyond that a request gets 413, 408, 504 or 429. A client that disconnects
cancels its work.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from whet import __version__
from whet.errors import ConfigError, MissingExtra
from whet.serving.base import ChatAnswer, ChatCaller, Host
from whet.serving.reply import DONE, Stream, completion, event
from whet.serving.wire import Refusal, read_body


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a server takes on."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
    """In which a request's head must have arrived, and then its body."""
    answer_s: float = 600.0
    """In which a request is answered."""
    concurrency: int = 64
    """Requests under way together; the others get a 429."""


@dataclass(slots=True, kw_only=True)
class Server:
    """An ASGI application over a host."""

    host: Host
    bounds: Bounds = field(default_factory=Bounds)
    names: frozenset[str] | None = None
    """Host names that a request may be for; None: any. A page in a browser that finds its way here has another one."""
    busy: int = field(default=0, init=False)
    """Requests under way."""

    def app(self) -> Any:
        """The application. Raises `MissingExtra`."""
        try:
            import uvicorn  # noqa: F401 - what runs it
            from starlette.applications import Starlette
            from starlette.exceptions import HTTPException
            from starlette.responses import JSONResponse
            from starlette.routing import Route
        except ImportError as error:
            raise MissingExtra("serving needs starlette and uvicorn; pip install 'whet[serve]'") from error

        async def health(_: Any) -> Any:
            return JSONResponse({"status": "ok", "version": __version__, "busy": self.busy})

        async def models(request: Any) -> Any:
            caller = self._caller(request)
            if (name := request.path_params.get("name")) is not None:
                return JSONResponse(_model(_known(name, caller)))
            return JSONResponse({"object": "list", "data": [_model(each) for each in caller.models]})

        async def chat(request: Any) -> Any:
            caller = self._caller(request)

            async def exchange(scope: Any, receive: Any, send: Any) -> None:
                with self._place(), suppress(_LeftError):
                    await self._exchange(caller, request, _Sender(send))

            return exchange

        async def refuse(_: Any, error: Any) -> Any:
            if not isinstance(error, Refusal):  # of the routes; or a bug, which is raised again behind this
                status = getattr(error, "status_code", 500)
                error = Refusal(status, str(getattr(error, "detail", "this server failed; its log says how")))
            return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)

        routes = [
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers=dict.fromkeys((Refusal, HTTPException, Exception), refuse))

    def _caller(self, request: Any) -> ChatCaller:
        name = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        if self.names is not None and name not in self.names:
            raise Refusal(403, f"this server is not {name[:80]!r}; ask it by one of {', '.join(sorted(self.names))}")
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        caller = self.host.caller(key.strip() if kind.lower() == "bearer" else "")
        if caller is None:
            raise Refusal(401, "wrong or missing API key; send Authorization: Bearer KEY", code="invalid_api_key")
        return caller

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.busy >= self.bounds.concurrency:
            raise Refusal(429, f"{self.busy} requests are under way; try again soon", code="overloaded")
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def _exchange(self, caller: ChatCaller, request: Any, out: _Sender) -> None:
        """One completion, from the request's body to the last byte of its answer."""
        asked = read_body(await self._body(request))
        _known(asked.model, caller)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        texts: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        work = caller.answer(asked, lambda index, text: texts.put_nowait((index, text)))
        try:
            async with asyncio.timeout(self.bounds.answer_s), _while_there(request.receive, work) as task:
                if not asked.stream:
                    await out.whole(completion(about, await task))
                    return
                task.add_done_callback(lambda _: texts.put_nowait(None))
                stream = Stream(about)
                while (more := await texts.get()) is not None:
                    await out.event(stream.text(*more))
                for each in stream.end(await task, usage=asked.wants_usage):
                    await out.event(each)
                await out.event(DONE, last=True)
        except (Refusal, TimeoutError) as error:
            refusal = error if isinstance(error, Refusal) else Refusal(504, f"no answer in {self.bounds.answer_s:g} s")
            if not out.begun:
                raise refusal from None
            with suppress(TimeoutError):  # too late for a status; and a client that reads nothing reads no error
                async with asyncio.timeout(1):
                    await out.event(event(refusal.body) + DONE, last=True)

    async def _body(self, request: Any) -> bytes:
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refusal(415, "the body must be sent as Content-Type: application/json")
        from starlette.requests import ClientDisconnect

        most, body = self.bounds.body_bytes, bytearray()
        try:
            async with asyncio.timeout(self.bounds.body_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise Refusal(413, f"the body has more than {most:,} bytes")
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.bounds.body_s:g} s") from None
        except ClientDisconnect:
            raise _LeftError from None
        return bytes(body)


class _Sender:
    """Writes a response; the first bytes bring its head."""

    def __init__(self, send: Any) -> None:
        self._send, self.begun = send, False

    async def whole(self, value: Any) -> None:
        await self._write(json.dumps(value), "application/json", last=True)

    async def event(self, text: str, *, last: bool = False) -> None:
        await self._write(text, "text/event-stream", last=last)

    async def _write(self, text: str, kind: str, *, last: bool) -> None:
        if not self.begun:
            headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self.begun = True
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


class _LeftError(Exception):
    """The client has disconnected."""


@asynccontextmanager
async def _while_there(receive: Any, work: Coroutine[Any, Any, ChatAnswer]) -> AsyncIterator[asyncio.Task[ChatAnswer]]:
    """The work as a task, which ends with the block, or as soon as the client is gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    gone.add_done_callback(lambda _: task.cancel())
    try:
        yield task
    except asyncio.CancelledError:
        us = asyncio.current_task()
        if gone.done() and us is not None and not us.cancelling():
            raise _LeftError from None
        raise
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _known(name: str, caller: ChatCaller) -> str:
    """The name, where it is that of a model. It is compared and nothing else: no name reaches the file system."""
    if name not in caller.models:
        known = ", ".join(caller.models)
        raise Refusal(404, f"no model {name[:80]!r} here; there is {known}", code="model_not_found", param="model")
    return name


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "whet"}


# ------------------------------------------------------------------------------------------- running


def listen(host: str, port: int) -> socket.socket:
    """A socket on that address; port 0 takes a free one. Raises `ConfigError`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)  # connections made before the server runs wait, and are not refused
    except OSError as error:
        raise ConfigError(f"{host}:{port}: cannot be listened on ({error.strerror}); choose another --port") from error
    return listening


def runner(server: Server) -> Any:
    """A uvicorn server of it: `run(sockets=[...])` returns after a signal, or when `should_exit` is set."""
    app = server.app()
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        """Closes a connection on which no whole head of a request has come in time; uvicorn waits for ever."""

        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.late is not None:
                self.late.cancel()

        def _watch(self) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and self.late is None:
                self.late = self.loop.call_later(server.bounds.body_s, self.transport.close)
            elif not waiting and self.late is not None:
                self.late.cancel()
                self.late = None

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            loop="asyncio",
            http=Bounded,
            ws="none",
            timeout_graceful_shutdown=2,
            limit_concurrency=4 * server.bounds.concurrency + 64,  # connections: what only connects is bounded, too
        )
    )


@contextmanager
def beside(server: Server) -> Iterator[str]:
    """Serve on a free port of this machine in a thread of its own; the base URL of the API, until the block ends."""
    running, listening = runner(server), listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, name="whet-serve", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        running.should_exit = True
        thread.join()
        listening.close()
