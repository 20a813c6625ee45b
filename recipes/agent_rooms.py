"""Rooms: find the way out of a building in which some doors are walled up. States recur: credit can be given by them.

    python recipes/agent_rooms.py sft | train | test

prints rows for `agent_rooms.yaml`. Twelve rooms lie in three rows of four, the same in every task, and the exit is the
last of them; a task says where one stands and which doors are open there. `go` moves through a door and tells the doors
of the next room. The only reward is for being at the exit in the end. Demonstrations walk at random in eight of ten
steps, so most of them do not find it.
"""

from __future__ import annotations

import json
import sys
from random import Random
from typing import Any

ROOMS, WIDE, EXIT = "abcdefghijkl", 4, "l"
WALLS = 4
"""Doors that are walled up; every room can still be reached."""
STEPS = 8
"""Most steps of a demonstration."""
WRONG = 0.8
"""The share of a demonstration's steps that go through a door at random."""


class Rooms:
    """Find the exit."""

    def reset(self, doors: dict[str, str], start: str) -> None:
        """Stand in a room."""
        self.doors, self.here = doors, start

    def go(self, room: str) -> str:
        """Go through a door.

        Args:
            room: A letter.
        """
        if self.here != EXIT:
            if len(room) != 1 or room not in self.doors[self.here]:
                raise ValueError(f"no door from {self.here} to {room[:8]!r}")
            self.here = room
        return "out" if self.here == EXIT else self.doors[self.here]

    def state(self) -> str:
        """The room."""
        return self.here

    def reward(self) -> float:
        """1 at the exit."""
        return float(self.here == EXIT)


def building(random: Random) -> dict[str, str]:
    """The doors of each room."""
    pairs = [(at, at + step) for at in range(len(ROOMS)) for step in (1, WIDE) if step == WIDE or (at + 1) % WIDE]
    pairs = [(one, other) for one, other in pairs if other < len(ROOMS)]
    while True:
        walled = set(random.sample(pairs, WALLS))
        doors = dict.fromkeys(ROOMS, "")
        for one, other in pairs:
            if (one, other) not in walled:
                doors[ROOMS[one]] += ROOMS[other]
                doors[ROOMS[other]] += ROOMS[one]
        if len(distances(doors, "a")) == len(ROOMS):
            return doors


def distances(doors: dict[str, str], to: str) -> dict[str, int]:
    """Steps from each room from which there is a way."""
    found, waiting = {to: 0}, [to]
    for room in waiting:
        for other in doors[room]:
            if other not in found:
                found[other] = found[room] + 1
                waiting.append(other)
    return found


def task(split: str, index: int) -> dict[str, Any]:
    """A building, with three to five steps to the exit."""
    random = Random(f"rooms/{split}/{index}")
    while True:
        doors, start = building(random), random.choice(ROOMS)
        if 3 <= distances(doors, EXIT)[start] <= 5:
            return {"prompt": f"{start}: {doors[start]}", "doors": doors, "start": start}


def demonstration(index: int) -> dict[str, Any]:
    """A walk of at most `STEPS` steps, which ends at the exit or gives up."""
    from whet.envs.tools.schema import as_tool

    row, random = task("sft", index), Random(f"rooms slips/{index}")
    play, far = Rooms(), distances(row["doors"], EXIT)
    play.reset(row["doors"], row["start"])
    said, seen = [{"role": "user", "content": row["prompt"]}], ""
    for number in range(STEPS):
        open_doors = row["doors"][play.here]
        to = random.choice(open_doors) if random.random() < WRONG else min(open_doors, key=far.__getitem__)
        call = {"id": f"call{number:05}", "function": {"name": "go", "arguments": {"room": to}}}
        seen = play.go(to)
        said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        said.append({"role": "tool", "content": seen, "tool_call_id": call["id"], "name": "go"})
        if seen == "out":
            break
    return {"messages": [*said, {"role": "assistant", "content": "."}], "tools": [as_tool("go", Rooms().go).schema]}


if __name__ == "__main__":
    made = demonstration if sys.argv[1] == "sft" else lambda index: task(sys.argv[1], index)
    for index in range({"sft": 8000, "train": 2000}.get(sys.argv[1], 200)):
        print(json.dumps(made(index)))
