"""The plainest environment: a question, one answer, over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from whet.envs.base import Observed, Opening, Task
from whet.records import Message


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """One play of a task that asks once."""

    task: Task

    async def start(self, *, seed: int) -> Opening:
        """The task's own messages."""
        return Opening(messages=self.task.messages)

    async def step(self, message: Message) -> Observed:
        """Nothing to observe, and the episode is over."""
        return Observed(over=True)

    async def close(self) -> Mapping[str, float]:
        """No opinion."""
        return {}
