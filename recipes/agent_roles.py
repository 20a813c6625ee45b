"""Roles: the chain of look-ups of `agent_hops.py`, of two or three hops, with thinking before each call.

    python recipes/agent_roles.py rows

writes demonstrations, tasks and held-out tasks for `agent_roles.yaml`. Thinking says how many hops are left and which
key was reached; the call repeats the key. In demonstrations each of the two slips in a fifth of the turns, so that
reasoning and calls have as much to learn.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

import agent_hops
from agent_hops import KEYS, Hops, task

agent_hops.HOPS = (2, 3)
WRONG = 0.2


class ThinkingHops(Hops):
    """Follow a chain of keys, and think first."""

    def user(self, message: str) -> None:
        """Take what follows the thinking as the answer."""
        super().user(message.rpartition("</think>")[2])


def demonstration(index: int, tools: list[Any]) -> dict[str, Any]:
    """A chain of thoughts and calls with their results."""
    row, random = task("sft", index), Random(f"roles slips/{index}")
    key, said = row["start"], [{"role": "user", "content": row["prompt"]}]
    for number in range(row["hops"]):
        thought = random.choice(KEYS) if random.random() < WRONG else key
        asked = random.choice(KEYS) if random.random() < WRONG else thought
        key = row["table"][asked]
        call = {"id": f"call{number:05}", "function": {"name": "look", "arguments": {"key": asked}}}
        thinking = f"<think>{row['hops'] - number}{thought}</think>"
        said.append({"role": "assistant", "content": thinking, "tool_calls": [call]})
        said.append({"role": "tool", "content": key, "tool_call_id": call["id"], "name": "look"})
    return {"messages": [*said, {"role": "assistant", "content": f"<think>0{key}</think>{key}"}], "tools": tools}


def write(folder: Path, demonstrations: int = 4000, tasks: int = 2000, held_out: int = 200) -> None:
    """The files that the recipe reads."""
    agent_hops.write(folder, demonstrations, tasks, held_out, shown=demonstration)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
