"""Answers that deserve nothing, beside the gold one: what does a reward give for them?

The best of them is what a policy finds first when it is trained on the reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from whet.config.rewards import RewardConfig, VerdictReward
from whet.envs.base import Task
from whet.envs.rewards.answers import gold_answer, marked_answer
from whet.envs.rewards.function import truth
from whet.envs.rewards.judge import PROBES

RIGHT = ("gold", "gold in tags")
"""Names of the answers that are right; the others deserve nothing."""
_TAGS = "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"
_FILLER = "Let me look at this from another side, step by step. "
_LISTED = 5
"""How many of the commonest golds an answer gives that gives several."""


def gold_text(task: Task, rewards: Sequence[RewardConfig]) -> str | None:
    """The gold of a row as an answer: from the column that a reward names, or where functions look for theirs."""
    asked = next((reward for reward in rewards if hasattr(reward, "gold")), None)
    gold: Any = truth(task.columns) if asked is None else task.columns.get(asked.gold)
    first = gold[0] if isinstance(gold, list) and gold else gold
    if first is None:
        return None
    return f"Verdict: {first}" if isinstance(asked, VerdictReward) else str(first)


def probes(tasks: Sequence[Task], golds: Sequence[str | None], *, most: int) -> list[Mapping[str, str]]:
    """For each task its answers by name; the one that rambles has some `most` tokens."""
    short = [None if gold is None else marked_answer(gold) or gold_answer(gold) for gold in golds]
    common = [gold for gold, _ in Counter(filter(None, short)).most_common(_LISTED)]
    alike = {"empty": "", "rambling": _FILLER * max(1, most // 16), "format only": _TAGS.format("", "")}
    if common:
        alike |= {"commonest gold": common[0], "several golds": ", ".join(f"\\boxed{{{gold}}}" for gold in common)}
    found: list[Mapping[str, str]] = []
    for index, (task, gold, answer) in enumerate(zip(tasks, golds, short, strict=True)):
        right = {} if gold is None else dict(zip(RIGHT, (gold, _TAGS.format("", answer)), strict=True))
        own = {"prompt copied": task.messages[-1].content, "says it is right": PROBES[index % len(PROBES)]}
        found.append({**right, **alike, **own})
    return found
