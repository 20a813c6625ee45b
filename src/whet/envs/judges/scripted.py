"""A chat that is a Python function: a rule that plays the judge, or a user's own client.

The function runs in a process of its own, so it may crash, hang or print; each is a failed reply with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from whet.envs.judges.cache import no_probabilities
from whet.errors import RewardError
from whet.records import Message, Reply
from whet.sandbox.base import FailureKind
from whet.sandbox.workers import WorkerPool
from whet.target import load_function

Script = Callable[[list[dict[str, str]]], object]

TOGETHER = 32
"""Conversations handed over at once; what came of them is kept before the next are asked."""


class ScriptedAsker:
    """`Asker` over the function that `path` (`file.py:function` or `module:function`) names.

    It is called with a list of `{"role", "content"}` and returns text. `deadline_s` is for one answer. Raises
    `RewardError` where it cannot be loaded.
    """

    alone = True

    def __init__(self, path: str, *, deadline_s: float) -> None:
        self.identity = f"script {path} {_content_of(path)}".rstrip()
        self._pool = WorkerPool("whet.envs.judges.scripted:load", arguments=[path], deadline_s=deadline_s)
        (loaded,) = self._pool.map([None])
        if loaded.failure is not None:
            self._pool.close()
            raise RewardError(f"script: {loaded.failure.message}")

    def ask(
        self, conversations: Sequence[Sequence[Message]], keys: Sequence[str], *, max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """The function's words on each conversation; the budget is the function's own affair."""
        payloads = [[message.as_dict() for message in each] for each in conversations]
        for first in range(0, len(payloads), TOGETHER):
            for number, result in enumerate(self._pool.map(payloads[first : first + TOGETHER]), first):
                if result.failure is not None:
                    late = result.failure.kind is FailureKind.TIMEOUT
                    yield number, Reply(message=None, failure=result.failure.message, timed_out=late)
                else:
                    yield number, Reply(message=Message(role="assistant", content=str(result.value)))

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """A function has none to tell."""
        raise no_probabilities(self.identity)

    def close(self) -> None:
        """Kill the process."""
        self._pool.close()


def _content_of(path: str) -> str:
    """Changes with what is in the script's own file; a module of a package is taken to stay as it is."""
    file = Path(path.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.suffix == ".py" and file.is_file() else ""


def load(path: str) -> Callable[[list[dict[str, str]] | None], str]:
    """The worker's side: the function, with its value checked; asked None, it only says that it is there."""
    function: Script = load_function(path)

    def answer(messages: list[dict[str, str]] | None) -> str:
        if messages is None:
            return ""
        said: Any = function(messages)
        if not isinstance(said, str):
            raise TypeError(f"returned a {type(said).__name__}, not text")
        return said

    return answer
