"""Sums of two numbers of one digit (half of them) to six, for `agent_ledger.yaml`: rows, one JSON object a line.

    python recipes/agent_ledger.py heart | sft | train | short | long

`heart` has the hundred sums of one digit, without a call. `long` is held out: both numbers have four to six digits;
`short` has sums of one digit, which were learned. Half of the demonstrations (`sft`), whatever the length, call the
calculator; the others state the sum at once.
"""

from __future__ import annotations

import json
import sys
from random import Random
from typing import Any

COUNTS = {"heart": 100, "sft": 8000, "train": 2000, "short": 100, "long": 100}


def task(split: str, index: int) -> dict[str, Any]:
    """A sum of two numbers with equally many digits."""
    random = Random(f"ledger/{split}/{index}")
    several = split == "long" or (split != "short" and random.random() < 0.5)
    digits = random.randint(4 if split == "long" else 2, 6) if several else 1
    low = 0 if digits == 1 else 10 ** (digits - 1)
    one, other = (random.randrange(low, 10**digits) for _ in range(2))
    return {"prompt": f"{one}+{other}", "answer": str(one + other)}


def demonstration(index: int) -> dict[str, Any]:
    """The sum, with or without a call."""
    from whet.envs.tools.calculator import calculator
    from whet.envs.tools.schema import as_tool

    row, tool = task("sft", index), as_tool("calculator", calculator)
    said: list[dict[str, Any]] = [{"role": "user", "content": row["prompt"]}]
    if index % 2:
        call = {"id": "call00000", "function": {"name": "calculator", "arguments": {"expression": row["prompt"]}}}
        said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        said.append({"role": "tool", "content": row["answer"], "tool_call_id": call["id"], "name": "calculator"})
    return {"messages": [*said, {"role": "assistant", "content": row["answer"]}], "tools": [tool.schema]}


def by_heart(index: int) -> dict[str, Any]:
    """One of the hundred sums of two numbers of one digit, without a call."""
    from whet.envs.tools.calculator import calculator
    from whet.envs.tools.schema import as_tool

    one, other = divmod(index, 10)
    said = [{"role": "user", "content": f"{one}+{other}"}, {"role": "assistant", "content": str(one + other)}]
    return {"messages": said, "tools": [as_tool("calculator", calculator).schema]}


if __name__ == "__main__":
    made = {"heart": by_heart, "sft": demonstration}.get(sys.argv[1]) or (lambda index: task(sys.argv[1], index))
    for index in range(COUNTS[sys.argv[1]]):
        print(json.dumps(made(index)))
