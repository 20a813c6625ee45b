"""The chain of look-ups of `agent_hops.py`, played by an ordinary program: a client of OpenAI's API and a loop.

It imports nothing of whet. It runs as it is against any server of chat completions, whet's own among them:

    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none WHET_MODEL=runs/agent_program
    WHET_TASK='{"messages": [{"role": "user", "content": "2 hops from a"}], "table": {"a": "b", "b": "c", "c": "a"},
      "start": "a", "hops": 2}' python recipes/agent_program.py

and as the environment of `agent_program.yaml` it trains the model that it asks.
"""

from __future__ import annotations

import json
import os
from typing import Any

import openai

LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Next key.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A letter."}},
            "required": ["key"],
        },
    },
}


def play(task: dict[str, Any]) -> dict[str, float]:
    """1 for the key at the end of the chain, and half the share of the chain that was looked up in order."""
    table, hops, messages = task["table"], task["hops"], list(task["messages"])
    chain = [task["start"]]
    for _ in range(hops):
        chain.append(table[chain[-1]])
    right, looks, said = 0, 0, ""
    with openai.OpenAI() as client:  # OPENAI_BASE_URL and OPENAI_API_KEY are those of this play
        try:
            while True:
                answer = client.chat.completions.create(
                    model=os.environ["WHET_MODEL"], messages=messages, tools=[LOOK], timeout=600
                )
                message = answer.choices[0].message
                if not message.tool_calls:
                    said = (message.content or "").strip()
                    break
                messages.append(message)
                for call in message.tool_calls:
                    key = json.loads(call.function.arguments).get("key")  # type: ignore[union-attr]
                    right += right == looks < hops and key == chain[looks]
                    looks += 1
                    found = table.get(key, f"error: there is no key {key!r}")
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": found})
        except openai.BadRequestError:  # out of turns or tokens
            pass
    return {"answer": float(said == chain[-1]), "looks": right / hops / 2}


if __name__ == "__main__":
    print(json.dumps(play(json.loads(os.environ["WHET_TASK"]))))
