"""Agreement of verifiers with labelled pairs: whet beside Math-Verify alone and beside equal strings.

    python -m benchmarks.verifiers FOLDER [--disagreements]

FOLDER holds any number of .jsonl or .jsonl.gz files; a row is a pair where it has a gold answer (`gold`,
`ground_truth`), a given one (`pred`, `fn_output`) and, unless every answer of the file is right, a label (`label`,
`expected`; null is skipped). Each given answer is graded inside `<answer>` tags. Rows with a `kind_of_case` other than
`truth` are choices of policy and left out. Prints one JSON line a file: false negatives and false positives of each
verifier, and grades a second of whet, by rule and where algebra is needed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from whet.envs.base import Attempt, Grade, Task
from whet.envs.rewards.answers import gold_answer
from whet.envs.rewards.math import MathReward
from whet.records import Message

Verdicts = Callable[[Sequence["Pair"]], list[bool]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A gold answer, a given one, and whether the given one is right."""

    gold: str
    given: str
    right: bool
    question: str


def pairs(file: Path) -> Iterator[Pair]:
    """The labelled pairs of a file."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for row in map(json.loads, lines):
            gold, given = row.get("gold", row.get("ground_truth")), row.get("pred", row.get("fn_output"))
            label = row.get("label", row.get("expected", 1))
            if gold is None or given is None or label is None or row.get("kind_of_case", "truth") != "truth":
                continue
            yield Pair(gold=str(gold), given=str(given), right=bool(label), question=str(row.get("question") or ""))


def attempt(pair: Pair) -> Attempt:
    """The given answer as a completion that marks it."""
    return Attempt(
        task=Task(id="pair", messages=(Message(role="user", content=pair.question),), columns={"answer": pair.gold}),
        messages=(Message(role="assistant", content=f"<answer>{pair.given}</answer>"),),
        completion_tokens=(),
        truncated=False,
        max_tokens=1,
    )


def by_string(some: Sequence[Pair]) -> list[bool]:
    """Whether the texts are the same, spaces aside."""
    return ["".join(gold_answer(pair.gold).split()) == "".join(pair.given.split()) for pair in some]


def by_math_verify(some: Sequence[Pair]) -> list[bool]:
    """Math-Verify's verdict, gold first; a bare answer in dollars, since it reads LaTeX only where that is marked."""
    return [_math_verify(pair) for pair in some]


def _math_verify(pair: Pair) -> bool:
    texts = [t if any(m in t for m in ("$", "\\(", "\\[", "\\boxed")) else f"${t}$" for t in (pair.gold, pair.given)]
    signal.alarm(20)
    try:
        return bool(verify(parse(texts[0]), parse(texts[1])))
    except Exception:  # noqa: BLE001 - its own alarms and whatever sympy raises: no verdict is "wrong"
        return False
    finally:
        signal.alarm(0)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--disagreements", action="store_true", help="print each pair on which whet and the label differ"
    )
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    reward = MathReward(name="math", weight=1.0, gold="answer", deadline_s=2.0)
    reward.grade([attempt(Pair(gold="a+b", given="b+a", right=True, question=""))], step=0)
    for file in sorted([*arguments.folder.rglob("*.jsonl"), *arguments.folder.rglob("*.jsonl.gz")]):
        some = list(pairs(file))
        if some:
            say(json.dumps({"file": file.name, **compare(reward, some, show=arguments.disagreements)}))
    reward.close()


def say(line: str) -> None:
    """A line of output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare(reward: MathReward, some: Sequence[Pair], *, show: bool) -> dict[str, Any]:
    """Counts of errors and whet's speed on the pairs."""
    attempts = [attempt(pair) for pair in some]
    grades = reward.grade(attempts, step=0)
    ours = [grade.value == 1 for grade in grades]
    if show:
        for pair, verdict in zip(some, ours, strict=True):
            if verdict != pair.right:
                say(f"{'false positive' if verdict else 'false negative'}: {pair.gold!r} | {pair.given!r}")
    decided = [isinstance(reward._by_rule(each), Grade) for each in attempts]
    rule = [each for each, by_rule in zip(attempts, decided, strict=True) if by_rule]
    open_ones = [each for each, by_rule in zip(attempts, decided, strict=True) if not by_rule]
    return {
        "right": sum(pair.right for pair in some),
        "wrong": sum(not pair.right for pair in some),
        "whet": errors(some, ours),
        "math_verify": errors(some, by_math_verify(some)),
        "string": errors(some, by_string(some)),
        "gave_up": sum(grade.gave_up for grade in grades),
        "unscored": sum(grade.value is None for grade in grades),
        "rule": {"pairs": len(rule), "per_second": speed(reward, rule)},
        "algebra": {"pairs": len(open_ones), "per_second": speed(reward, open_ones)},
        "load": round(os.getloadavg()[0], 1),
    }


def errors(some: Sequence[Pair], verdicts: Sequence[bool]) -> dict[str, int]:
    """False negatives and false positives."""
    counts = Counter((pair.right, verdict) for pair, verdict in zip(some, verdicts, strict=True))
    return {"false_negatives": counts[True, False], "false_positives": counts[False, True]}


def speed(reward: MathReward, attempts: Sequence[Attempt]) -> float | None:
    """Grades a second of wall time, on as many workers as the machine has cores."""
    if not attempts:
        return None
    began = time.monotonic()
    reward.grade(attempts, step=0)
    return round(len(attempts) / (time.monotonic() - began), 1)


if __name__ == "__main__":
    main()
