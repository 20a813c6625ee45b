"""Three lines of arithmetic that build on each other, for `code_agent.yaml`: rows, one JSON object a line.

    python recipes/code_agent.py sft | train | test

A puzzle gives a, then b by a, and asks for a third value of both: a=23*7;b=a-45;a+b. A demonstration runs one line a
call, so the interpreter must keep its variables, and answers with what the last call shows. In four of ten calls a
demonstration slips: it runs another sum than the one that was asked for.
"""

from __future__ import annotations

import json
import sys
from random import Random
from typing import Any

COUNTS = {"sft": 8000, "train": 2000, "test": 200}
WRONG = 0.4
"""The share of a demonstration's calls that slip."""


def lines(random: Random) -> list[str]:
    """What to run, line by line."""
    first = f"a={random.randint(2, 99)}{random.choice('*+-')}{random.randint(2, 99)}"
    second = f"b=a{random.choice('+-')}{random.randint(2, 99)}"
    return [first, second, random.choice(["a+b", "a-b", "b-a", "a*b"])]


def task(split: str, index: int) -> dict[str, Any]:
    """A puzzle; its answer is what Python says."""
    asked = lines(Random(f"code/{split}/{index}"))
    return {"prompt": ";".join(asked), "answer": str(value(asked))}


def value(said: list[str]) -> int:
    """What the last line gives."""
    space: dict[str, Any] = {}
    exec("\n".join([*said[:-1], f"result = {said[-1]}"]), space)
    return int(space["result"])


def demonstration(index: int) -> dict[str, Any]:
    """A call for each line, with the results that the interpreter gives."""
    from whet.envs.tools.python import Python
    from whet.envs.tools.schema import as_tool

    random = Random(f"code slips/{index}")
    asked = task("sft", index)["prompt"].split(";")
    run = [other if random.random() < WRONG else line for line, other in zip(asked, lines(random), strict=True)]
    result = str(value(run))
    said: list[dict[str, Any]] = [{"role": "user", "content": ";".join(asked)}]
    for number, (line, shown) in enumerate(zip(run, ["(no output)", "(no output)", result], strict=True)):
        call = {"id": f"call{number:05}", "function": {"name": "python", "arguments": {"code": line}}}
        said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        said.append({"role": "tool", "content": shown, "tool_call_id": call["id"], "name": "python"})
    tools = [as_tool("python", Python().python).schema]
    return {"messages": [*said, {"role": "assistant", "content": result}], "tools": tools}


if __name__ == "__main__":
    for index in range(COUNTS[sys.argv[1]]):
        print(json.dumps(demonstration(index) if sys.argv[1] == "sft" else task(sys.argv[1], index)))
