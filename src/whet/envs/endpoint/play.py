"""Plays in which a program asks the policy: what arrives at the endpoint is turned into turns of an episode.

The environment door is the wrong way round for a program that calls: here its next request is what a step observes,
and the message that the next step is given is the answer to it. So a program's turns are sampled, counted and bounded
as those of any environment are, from the same seeds. A request whose messages begin with those of an earlier turn and
its answer continues that turn's tokens; another one begins a conversation of its own.

Whose fault: a program that fails, or is late, after the policy has answered it failed on what it was told; before that,
with exit code 75 or `whet.Broken`, the machinery did.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from whet.config.environment import EnvironmentConfig
from whet.envs.base import Observed, Opening, Task
from whet.errors import ConfigError, DataError, EnvironmentFailure, PolicyFault
from whet.records import Message
from whet.sandbox.base import JSON, Failure, Result
from whet.sandbox.sessions import Session, Sessions
from whet.serving.app import Bounds, Server, beside
from whet.serving.base import ChatAnswer, ChatChoice, Heard, said
from whet.serving.wire import ChatBody, Refusal

MODEL = "policy"
"""What a program calls the model that it asks."""
LONGEST_TASK = 120_000
"""Bytes of a task, which has to fit into an environment variable."""
FAREWELL_S = 10.0
"""Seconds for a program to end after its episode is over, so that its reward is known."""
FOREVER_S = 1e6
OVER = Refusal(400, "the episode is over: out of turns or tokens", code="episode_over")


class ProgramEnvironments:
    """Makes the plays of a program, and is the host that they ask; close it when all are over.

    Raises `ConfigError` where the program cannot be loaded, and `MissingExtra` where nothing can be served.
    """

    tools: tuple[dict[str, Any], ...] = ()
    """None before it asks: a program offers its own."""
    hooks: frozenset[str] = frozenset()

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config, self.plays = config, dict[str, ProgramPlay]()
        arguments: list[JSON] = [str(config.path), config.command, config.options]
        with ExitStack() as stack:
            bounds = Bounds(concurrency=16 * config.processes, answer_s=FOREVER_S)
            self.url = stack.enter_context(beside(Server(host=self, bounds=bounds)))
            self.sessions = Sessions(
                "whet.envs.endpoint.worker:load", arguments=arguments, most=config.processes, python=config.python
            )
            stack.callback(self.sessions.close)
            loaded = self.sessions.once({}, FAREWELL_S)
            if loaded.failure is not None:
                raise ConfigError(f"environment: {loaded.failure.message}")
            self._opened = stack.pop_all()

    def make(self, task: Task) -> ProgramPlay:
        """One play of a task."""
        return ProgramPlay(task=task, made=self)

    def caller(self, key: str) -> ProgramPlay | None:
        """`Host`: the play whose key it is."""
        return self.plays.get(key)

    def check(self, task: Task) -> None:
        """Raise `DataError` where a task lacks a column, or is too long to be told."""
        for name in self.config.columns:
            if name not in task.columns:
                has = ", ".join(sorted(task.columns)) or "none"
                raise DataError(f"task {task.id}: the environment's columns name {name!r}; the row's columns: {has}")
        if (size := len(json.dumps(self.told(task)).encode())) > LONGEST_TASK:
            raise DataError(f"task {task.id}: has {size:,} bytes, and a program can be told {LONGEST_TASK:,}")

    def told(self, task: Task) -> dict[str, Any]:
        """What a program knows of its task, as JSON has it."""
        told = {"id": task.id, "messages": [message.as_dict() for message in task.messages]}
        told |= {name: task.columns[name] for name in self.config.columns}
        as_json: dict[str, Any] = json.loads(json.dumps(told, default=str))
        return as_json

    def close(self) -> None:
        """End every process, then the server. May be called twice."""
        self._opened.close()


@dataclass(eq=False, slots=True)
class _Call:
    """A request of the program, and the answer that it waits for."""

    asked: ChatBody
    arrived: float
    answer: Future[ChatAnswer | Refusal] = field(default_factory=Future)
    left: bool = False
    """Whether its client did not wait; the same request again is that client's, and gets the same answer."""


@dataclass(kw_only=True, slots=True, eq=False)
class ProgramPlay:
    """`Environment` for the player, and `ChatCaller` for the program."""

    task: Task
    made: ProgramEnvironments
    models: Sequence[str] = (MODEL,)
    key: str = field(default_factory=lambda: f"whet-{secrets.token_hex(16)}")
    calls: list[_Call] = field(default_factory=list)
    """In the order in which they arrived, which is that of the turns."""
    waiting: asyncio.Queue[_Call] = field(default_factory=asyncio.Queue)
    """Those that the player has not seen."""
    spoken: list[tuple[Message, ...]] = field(default_factory=list)
    """After each turn the conversation with its answer, as the program knows it."""
    session: Session | None = None
    program: asyncio.Task[Result] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    spent_s: float = 0.0
    """Seconds that the program took, without those in which it waited for the policy."""
    refused: bool = False
    """Whether it asked for something that is not done here."""
    over: bool = False

    async def start(self, *, seed: int) -> Opening:
        """Start the program, and wait for what it asks first."""
        opened = await self.made.sessions.open()
        if isinstance(opened, Failure):
            raise EnvironmentFailure(opened.message)
        self.session, self.loop = opened, asyncio.get_running_loop()
        self.made.plays[self.key] = self
        told = self.made.told(self.task)
        env = {
            "OPENAI_BASE_URL": self.made.url,
            "OPENAI_API_KEY": self.key,
            "WHET_MODEL": MODEL,
            "WHET_TASK": json.dumps(told),
            "WHET_SEED": str(seed),
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
        }
        self.program = asyncio.create_task(opened.ask({"task": told, "env": env, "seed": seed}, FOREVER_S))
        asked = await self._next()
        if asked is None:
            raise EnvironmentFailure("the program ended without asking the policy")
        return Opening(messages=asked.conversation, tools=asked.offered)

    async def step(self, message: Message) -> Observed:
        """Answer the program, and wait for what it asks next."""
        call = self.calls[len(self.spoken)]
        content, calls = said(message)
        answered = Message(role="assistant", content=content, tool_calls=calls)
        self.spoken.append((*call.asked.conversation, answered))
        call.answer.set_result(ChatAnswer(choices=(ChatChoice(content=content, calls=calls),)))
        asked = await self._next()
        return Observed(over=True) if asked is None else self._observed(asked)

    async def close(self) -> Mapping[str, float | Sequence[float]]:
        """Tell the program that it is over, where it does not know; the process is gone, and what it said is known."""
        self.over = True
        try:
            return await self._worth()
        finally:
            self.made.plays.pop(self.key, None)
            if self.program is not None:
                self.program.cancel()
                await asyncio.gather(self.program, return_exceptions=True)
            if self.session is not None:
                self.session.close()

    async def _worth(self) -> Mapping[str, float | Sequence[float]]:
        if self.program is None:
            return {}
        cut = self.calls[len(self.spoken) :]
        for call in cut:
            call.answer.set_result(OVER)
        await asyncio.wait([self.program], timeout=FAREWELL_S)
        ended = self.program.done() and not self.program.cancelled()
        value: Any = (self.program.result().value if ended else None) or {}
        if cut and "worth" not in value:  # else what runs out of its limits would be worth nothing known
            raise PolicyFault(f"the program did not end well when its episode was over: {value.get('failed', 'late')}")
        worth: Mapping[str, float | Sequence[float]] = value.get("worth", {})
        return worth

    async def answer(self, asked: ChatBody, heard: Heard) -> ChatAnswer:
        """`ChatCaller`, in the server's thread. How the policy is sampled is the recipe's affair."""
        given = {"n": asked.n not in (None, 1), "stop": asked.stop, "logprobs": asked.logprobs}
        for name, value in (given | {"chat_template_kwargs": asked.chat_template_kwargs}).items():
            if value:
                self.refused = True
                raise Refusal(400, f"{name}: the recipe says how its policy is sampled; leave it out", param=name)
        assert self.loop is not None, "nothing knows the key of a play that was not started"
        call = _Call(asked, time.monotonic())
        self.loop.call_soon_threadsafe(self._arrive, call)
        try:
            found = await asyncio.shield(asyncio.wrap_future(call.answer))
        except asyncio.CancelledError:
            call.left = True
            raise
        if isinstance(found, Refusal):
            raise found
        return found

    def _arrive(self, call: _Call) -> None:
        earlier = next((each for each in self.calls if each.left and each.asked.digest == call.asked.digest), None)
        if earlier is not None:
            self.calls[self.calls.index(earlier)] = call  # in its place, so that it may be left in turn
            if earlier.answer.done():
                call.answer.set_result(earlier.answer.result())
        elif self.over:
            call.answer.set_result(OVER)
        else:
            self.calls.append(call)
            self.waiting.put_nowait(call)

    async def _next(self) -> ChatBody | None:
        """What the program asks next; None: it has ended well."""
        assert self.program is not None, "started"
        arriving, began = asyncio.ensure_future(self.waiting.get()), time.monotonic()
        most_s = self.made.config.limits.episode_s
        await asyncio.wait(
            [arriving, self.program], timeout=max(0.0, most_s - self.spent_s), return_when=asyncio.FIRST_COMPLETED
        )
        if arriving.done():
            call = arriving.result()
            self.spent_s += max(0.0, call.arrived - began)
            return call.asked
        arriving.cancel()
        if not self.program.done():
            raise self._failure(f"did not end within {most_s:g} s and was killed")
        result = self.program.result()
        value: Any = result.value if result.failure is None else {"failed": result.failure.message}
        if "broken" in value:
            raise EnvironmentFailure(f"the program failed: {value['broken']}")
        if "failed" in value:
            raise self._failure(f"failed: {value['failed']}")
        return None

    def _failure(self, what: str) -> Exception:
        """Whose it is; the process is killed."""
        assert self.session is not None and self.program is not None, "started"
        machinery = not self.spoken or self.refused or self.session.orphaned
        self.program.cancel()
        return EnvironmentFailure(f"the program {what}") if machinery else PolicyFault(f"the program {what}")

    def _observed(self, asked: ChatBody) -> Observed:
        """The turn that a request continues, and with what; the latest one where there are several."""
        messages, tools = asked.conversation, asked.offered
        for turn in reversed(range(len(self.spoken))):
            before = self.spoken[turn]
            same = len(messages) > len(before) and self.calls[turn].asked.offered == tools
            if same and all(map(_alike, before, messages)):
                rest, last = messages[len(before) :], turn + 1 == len(self.spoken)
                continued = Opening(messages=rest, tools=tools, after=turn)
                return Observed(messages=rest) if last else Observed(opens=continued)
        return Observed(opens=Opening(messages=messages, tools=tools))


def _alike(one: Message, other: Message) -> bool:
    """Whether a program sent back what it was told; what it may leave out is not compared."""
    pairs = [
        (m.role, m.content, m.tool_call_id, [(c.id, c.name, dict(c.arguments)) for c in m.tool_calls])
        for m in (one, other)
    ]
    return pairs[0] == pairs[1]
