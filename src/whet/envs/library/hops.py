"""Hops: follow a chain of look-ups in a table that only a tool knows. The smallest task on which a tool pays.

A task gives a key and a number of hops; `look` says which key follows another, and the answer is the key at the end.
Without the tool one of fifteen keys must be guessed. Demonstrations look up a wrong key now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.envs.library.ranking import OBJECTIVES
from whet.envs.library.split import draw_problem
from whet.envs.tools.schema import as_tool
from whet.errors import DataError
from whet.records import Message, ToolCall

KEYS = "abcdefghijklmnop"
SPREAD = 3
"""Tasks have `hops` hops, or up to two fewer."""


class HopsEnvironment:
    """Follow a chain of keys."""

    def reset(self, table: dict[str, str], start: str, hops: int) -> None:
        """Begin at `start`."""
        self._table, self._hops = table, hops
        self._chain = [start]
        for _ in range(hops):
            self._chain.append(table[self._chain[-1]])
        self._seen, self._looks, self._right, self._answer = start, 0, 0, ""

    def look(self, key: str) -> str:
        """Next key.

        Args:
            key: A letter.

        """
        if key not in self._table:
            raise ValueError(f"there is no key {key!r}")
        if self._right == self._looks < self._hops and key == self._chain[self._looks]:
            self._right += 1
        self._looks += 1
        self._seen = self._table[key]
        return self._seen

    def turn_reward(self) -> float:
        """The turn's share of right look-ups, each of which is worth 1 / hops."""
        gained, self._paid = self._right - getattr(self, "_paid", 0), self._right
        return gained / self._hops

    def state(self) -> tuple[str, int, int]:
        """What was seen last, and how many look-ups there were, in all and right ones."""
        return self._seen, self._looks, self._right

    def user(self, message: str) -> None:
        """Take the answer: the play is over."""
        self._answer = message.strip()

    def reward(self) -> float:
        """1 for the key at the end of the chain."""
        return float(self._answer == self._chain[-1])


@dataclass(frozen=True, slots=True)
class Hops:
    """Tables of 16 keys in a ring, and chains of `hops` or up to two fewer hops."""

    version: ClassVar[int] = 1
    tools: ClassVar[tuple[dict[str, Any], ...]] = (as_tool("look", HopsEnvironment().look).schema,)
    config: GeneratedConfig

    def task(self, index: int) -> Task:
        """The start and the number of hops; columns `table`, `start`, `hops` and `answer`."""

        def draw(random: Random) -> tuple[list[str], int]:
            return random.sample(KEYS, len(KEYS)), self.config.hops - random.randrange(min(SPREAD, self.config.hops))

        ring, hops = draw_problem(self.config, index, draw, lambda problem: f"{''.join(problem[0])}{problem[1]}")
        table = {key: ring[(place + 1) % len(ring)] for place, key in enumerate(ring)}
        columns = {"table": table, "start": ring[0], "hops": hops, "answer": ring[hops % len(ring)]}
        asked = f"{hops} hops from {ring[0]}"
        return Task(
            id=f"hops:{index}:{''.join(ring)}{hops}",
            messages=(Message(role="user", content=asked),),
            columns=columns,
        )

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """A chain of calls with their results; a share `wrong` of the calls asks for some other key."""
        task, random = self.task(index), Random(f"hops slips/{self.config.seed}/{index}")
        table, key, said = task.columns["table"], task.columns["start"], list(task.messages)
        for number in range(task.columns["hops"]):
            asked = random.choice(KEYS) if random.random() < self.config.wrong else key
            call = ToolCall(name="look", arguments={"key": asked}, id=f"call{number:05}")
            key = table[asked]
            said.append(Message(role="assistant", content="", tool_calls=(call,)))
            said.append(Message(role="tool", content=key, tool_call_id=call.id, name=call.name))
        return *said, Message(role="assistant", content=key)

    def ranking(self, index: int) -> tuple[str, ...]:
        """None: raises `DataError`."""
        raise DataError("generate: hops has no answers to compare; use arithmetic or countdown")

    def worth(self, attempt: Attempt) -> float:
        """Whether it is right."""
        return self.verify(attempt).value or 0.0

    def ratings(self, attempt: Attempt) -> dict[str, float]:
        """The same by every objective."""
        return dict.fromkeys(OBJECTIVES, self.worth(attempt))

    def verify(self, attempt: Attempt) -> Grade:
        """1 for the key at the end of the chain."""
        return Grade(value=float(attempt.answer.strip() == attempt.task.columns["answer"]))
