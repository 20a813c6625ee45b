"""The user of a dialogue: the row's script, or a model, endpoint or function that plays the role in the row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakKeyDictionary

from whet.envs.base import Task
from whet.errors import DataError, EnvironmentFailure
from whet.records import Message, Reply

Ask = Callable[[list[tuple[Message, ...]]], Awaitable[list[Reply]]]
"""Awaits one reply to each conversation."""

STOP = "###STOP###"
"""What a simulated user writes when it is done."""
PART = (
    "You play a user who talks to an assistant. Stay in your part, and write only what the user says next. Tell what "
    "is in your part when it is asked for, not all at once. When all that you want is done, or cannot be done, write "
    f"{STOP}."
)
GREETING = Message(role="user", content="Hello, how can I help you?")
"""What a conversation begins with for the model that plays the user, whose own words are its answers."""


class SimulatedUsers:
    """Asks one client for all plays. What it says depends on the conversation alone: equal ones are asked once.

    Without `ask` the rows have scripts.
    """

    def __init__(self, ask: Ask | None = None, close: Callable[[], None] = lambda: None) -> None:
        self._ask, self.close = ask, close
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = WeakKeyDictionary()

    def check(self, task: Task) -> None:
        """Raise `DataError` where the row does not say what its user is like."""
        column, kind, what = ("script", list, "texts") if self._ask is None else ("scenario", str, "text")
        given = task.columns.get(column)
        if not isinstance(given, kind) or (
            isinstance(given, list) and not all(isinstance(each, str) for each in given)
        ):
            raise DataError(f"task {task.id}: kind: dialogue needs the column {column!r} ({what}); add or map it")

    async def says(self, task: Task, talk: Sequence[Message]) -> str | None:
        """What the user says to the talk's last message; None: it is done. Raises `EnvironmentFailure`."""
        if self._ask is None:
            turn = _spoken(talk) - _spoken(task.messages)
            script = task.columns["script"]
            return script[turn - 1] if turn <= len(script) else None
        system = Message(role="system", content=f"{PART}\n\n{task.columns['scenario']}")
        turned = tuple(
            Message(role="user" if message.role == "assistant" else "assistant", content=message.content)
            for message in talk
            if message.role in ("user", "assistant") and message.content
        )
        reply = await self._asked((system, GREETING, *turned))
        if reply.message is None:
            raise EnvironmentFailure(f"the simulated user: {reply.failure}")
        said = reply.message.content.rpartition("</think>")[2].strip()
        return None if STOP in said else said

    async def _asked(self, conversation: tuple[Message, ...]) -> Reply:
        """The reply. Each event loop has a queue: an evaluation may be played while training plays ahead in another."""
        assert self._ask is not None
        return await self._queues.setdefault(asyncio.get_running_loop(), _Queue(self._ask)).asked(conversation)


class _Queue:
    """Conversations of one event loop; those that come while others are answered are asked together after them."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._waiting: list[tuple[tuple[Message, ...], asyncio.Future[Reply]]] = []
        self._work: asyncio.Task[None] | None = None

    async def asked(self, conversation: tuple[Message, ...]) -> Reply:
        """The reply to one."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((conversation, reply))
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._answer())
        return await reply

    async def _answer(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, []
            different = list(dict.fromkeys(conversation for conversation, _ in asked))
            try:
                replies = await self._ask(different)
            except Exception as error:  # noqa: BLE001 - raised where it is awaited
                for _, waiting in asked:
                    if not waiting.done():
                        waiting.set_exception(error)
                continue
            known = dict(zip(different, replies, strict=True))
            for conversation, waiting in asked:
                if not waiting.done():
                    waiting.set_result(known[conversation])


def _spoken(messages: Sequence[Message]) -> int:
    """How many of them are an assistant's, to a user."""
    return sum(message.role == "assistant" and not message.tool_calls for message in messages)
