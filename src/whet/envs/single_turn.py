"""The plainest environment: a question, one answer, over."""

from __future__ import annotations

from dataclasses import dataclass

from whet.envs.base import Task
from whet.records import Message


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """One play of a task that asks once."""

    task: Task

    async def start(self) -> tuple[Message, ...]:
        """The task's own messages."""
        return self.task.messages

    async def step(self, message: Message) -> tuple[tuple[Message, ...], bool]:
        """Nothing to observe, and the episode is over."""
        return (), True
