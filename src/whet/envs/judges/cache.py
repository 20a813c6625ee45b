"""Chats whose answers are kept on disk: the same question is not sent, waited or paid for twice.

An answer is looked up by the client (with its settings), the conversation, the token budget, and how many times
the same question came before it in the same call: three votes on one question are three answers. Each is appended as
soon as it is there, so a killed run loses none, and a resumed one has the answers of an unbroken one. Failures
are not kept, nor empty replies or replies without a verdict: they are requested again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from whet.envs.clients import Readable
from whet.errors import ConfigError
from whet.files import writing
from whet.records import Message, Reply


class Asker(Protocol):
    """The client: an endpoint, a model or a script."""

    @property
    def identity(self) -> str:
        """Model and settings: equal identities give exchangeable answers."""

    @property
    def alone(self) -> bool:
        """Whether an answer is independent, bit for bit, of the other requests of its call."""

    def ask(
        self, conversations: Sequence[Sequence[Message]], keys: Sequence[str], *, max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Replies with the numbers of their conversations, as they come; every number once.

        A client that draws random numbers seeds them with the conversation's key.
        """

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """As in `Chat`."""

    def close(self) -> None:
        """As in `Chat`."""


class CachedChat:
    """`Chat` over an asker; answers are kept in `path`, or in memory alone where that is None.

    The file is read at the first question. Several processes may share one.
    """

    def __init__(self, asker: Asker, path: Path | None) -> None:
        self._asker, self._path = asker, path
        self._kept: dict[str, Reply] | None = None

    def chat(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int, readable: Readable | None = None
    ) -> list[Reply]:
        """One reply to each conversation, in order; only those that are not kept yet are asked for."""
        if self._kept is None:
            self._kept = {} if self._path is None else read_answers(self._path)
        keys = self._keys(conversations, max_tokens)
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        # Where answers depend on their company, a call that was cut off is sent again as a whole, for equal answers.
        wanted = missing if self._asker.alone else [i for i in range(len(keys)) if missing]
        failures: dict[int, Reply] = {}
        asking = [conversations[i] for i in wanted]
        for number, reply in self._asker.ask(asking, [keys[i] for i in wanted], max_tokens=max_tokens):
            index = wanted[number]
            if reply.message is None:
                failures[index] = reply
            elif not reply.message.content.strip():
                failures[index] = replace(reply, message=None, failure="an empty reply")
            elif readable is not None and not readable(index, reply):
                failures[index] = reply
            elif keys[index] not in self._kept:
                self._keep(keys[index], reply, reply.message)
        return [self._kept[key] if key in self._kept else failures[i] for i, key in enumerate(keys)]

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """Not kept: a local model's forward pass is its own record."""
        return self._asker.probabilities(conversations, options)

    def close(self) -> None:
        """End the asker."""
        self._asker.close()

    def _keys(self, conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
        times: Counter[str] = Counter()
        keys = []
        for conversation in conversations:
            said = [[message.role, message.content] for message in conversation]
            asked = json.dumps([self._asker.identity, said, max_tokens], ensure_ascii=False)
            times[asked] += 1
            whole = f"{asked}{times[asked]}".encode("utf-8", "surrogatepass")
            keys.append(hashlib.sha256(whole).hexdigest()[:32])
        return keys

    def _keep(self, key: str, reply: Reply, message: Message) -> None:
        assert self._kept is not None
        self._kept[key] = replace(reply, message=replace(message, tool_calls=()))
        if self._path is not None:
            said = {"content": message.content, "thinking": message.thinking, "cut_off": reply.cut_off}
            append_line(self._path, {"key": key, **said})


def no_probabilities(who: str) -> ConfigError:
    """The error of a client without log-probabilities."""
    return ConfigError(f"{who} answers with text alone; read: probabilities needs a local model, model: {{path: ...}}")


def read_answers(path: Path) -> dict[str, Reply]:
    """The answers in a file; a line that was cut off is removed from it, one that is damaged is passed over."""
    kept: dict[str, Reply] = {}
    if not path.exists():
        return kept
    with writing(path, 0), path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
    for line in data[:whole].splitlines():
        try:
            entry = json.loads(line)
            key, content, thinking, cut_off = (entry[name] for name in ("key", "content", "thinking", "cut_off"))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # it is asked again
        texts = isinstance(key, str) and isinstance(content, str) and isinstance(thinking, str | None)
        if texts and isinstance(cut_off, bool) and content.strip():
            message = Message(role="assistant", content=content, thinking=thinking)
            kept[key] = Reply(message=message, cut_off=cut_off)
    return kept


def append_line(path: Path, value: dict[str, str | bool | None]) -> None:
    """One more line of JSON, in one write, so that processes that share the file do not mix theirs."""
    data = (json.dumps(value) + "\n").encode()
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            written = os.write(file.fileno(), data)
            if written < len(data):  # a disk that is nearly full takes a part; the next reader removes it
                os.write(file.fileno(), data[written:])
