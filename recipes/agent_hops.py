"""Hops: follow a chain of look-ups in a table that only a tool knows. The smallest task on which a tool pays.

    python recipes/agent_hops.py rows [4 5 6]

writes demonstrations, tasks and held-out tasks for `agent_hops.yaml` into a folder. A task gives a key and a number of
hops; `look` says which key follows another, and the answer is the key at the end. Without the tool one of fifteen keys
must be guessed. Demonstrations ask for some other key in four of ten look-ups. Numbers of hops other than 3, 4 and 5
are given after the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

KEYS = "abcdefghijklmnop"
HOPS = (3, 4, 5)
WRONG = 0.4
"""The share of a demonstration's look-ups that ask for some other key."""


class Hops:
    """Follow a chain of keys."""

    def reset(self, table: dict[str, str], start: str, hops: int) -> None:
        """Begin at `start`."""
        self.table, self.hops, self.chain = table, hops, [start]
        for _ in range(hops):
            self.chain.append(table[self.chain[-1]])
        self.seen, self.looks, self.right, self.paid, self.answer = start, 0, 0, 0, ""

    def look(self, key: str) -> str:
        """Next key.

        Args:
            key: A letter.
        """
        if key not in self.table:
            raise ValueError(f"there is no key {key!r}")
        self.right += self.right == self.looks < self.hops and key == self.chain[self.looks]
        self.looks += 1
        self.seen = self.table[key]
        return self.seen

    def turn_reward(self) -> float:
        """1 / hops for each right look-up of the turn."""
        gained, self.paid = self.right - self.paid, self.right
        return gained / self.hops

    def state(self) -> tuple[str, int, int]:
        """What was seen last, and how many look-ups there were, in all and right ones."""
        return self.seen, self.looks, self.right

    def user(self, message: str) -> None:
        """Take the answer: the play is over."""
        self.answer = message.strip()

    def reward(self) -> float:
        """1 for the key at the end of the chain."""
        return float(self.answer == self.chain[-1])


def task(name: str, index: int) -> dict[str, Any]:
    """A ring of all keys, where to begin and how far to go; the halves draw from seeds of their own."""
    random = Random(f"hops/{name}/{index}")
    ring, hops = random.sample(KEYS, len(KEYS)), random.choice(HOPS)
    table = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
    return {"prompt": f"{hops} hops from {ring[0]}", "table": table, "start": ring[0], "hops": hops}


def demonstration(index: int, tools: list[Any]) -> dict[str, Any]:
    """A chain of calls with their results."""
    row, random = task("sft", index), Random(f"hops slips/{index}")
    key, said = row["start"], [{"role": "user", "content": row["prompt"]}]
    for number in range(row["hops"]):
        asked = random.choice(KEYS) if random.random() < WRONG else key
        key = row["table"][asked]
        call = {"id": f"call{number:05}", "function": {"name": "look", "arguments": {"key": asked}}}
        said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        said.append({"role": "tool", "content": key, "tool_call_id": call["id"], "name": "look"})
    return {"messages": [*said, {"role": "assistant", "content": key}], "tools": tools}


def write(
    folder: Path, demonstrations: int = 8000, tasks: int = 2000, held_out: int = 200, shown: Any = demonstration
) -> None:
    """The files that the recipe reads; `shown` makes one of the demonstrations."""
    from whet.envs.tools.schema import as_tool

    tools = [as_tool("look", Hops().look).schema]
    files: dict[str, Iterator[dict[str, Any]]] = {
        "demonstrations": (shown(index, tools) for index in range(demonstrations)),
        "tasks": (task("rl", index) for index in range(tasks)),
        "held_out": (task("held out", index) for index in range(held_out)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    HOPS = tuple(map(int, sys.argv[2:])) or HOPS
    write(Path(sys.argv[1]))
