"""What the gold actions of tau2's tasks are worth in our domain class, and what doing nothing is: run where tau2 is.

PYTHONPATH=src VENV/bin/python tests/frameworks/gold.py retail airline
"""

import os
import sys

import loguru

from whet.envs.adapters.tau2 import Domain


def worth(task: str, *, acts: bool) -> float:
    """Of one play, in a process of its own."""
    reads, writes = os.pipe()
    if os.fork() == 0:
        play = Domain()
        play.reset(task)
        asked = play._task.evaluation_criteria
        tools = {tool.name: tool.function for tool in play.offered()}
        for action in (asked.actions or []) if acts else []:
            try:
                tools[action.name](**action.arguments)
            except Exception:  # noqa: BLE001
                continue  # some gold actions are refused, as in tau2's own evaluator
        play.user(" ".join(asked.communicate_info or []) if acts else "")
        os.write(writes, str(play.reward()["reward"]).encode())
        os._exit(0)
    os.wait()
    os.close(writes)
    value = float(os.read(reads, 100))
    os.close(reads)
    return value


if __name__ == "__main__":
    loguru.logger.remove()
    for domain in sys.argv[1:]:
        Domain.load(domain)
        tasks = [row["task"] for row in Domain.rows(domain)]
        gold, idle = (sum(worth(task, acts=acts) for task in tasks) for acts in (True, False))
        print(f"{domain}: {len(tasks)} tasks, gold actions {gold:g}, nothing {idle:g}")
