"""The agreement stage: a judge decides comparisons whose better answer is known, before it is used.

STAGE/rows.jsonl    every pair with the judge's verdict and words, to see where it goes wrong
STAGE/reward.json   how often it agrees, in the shape of a reward model's, and how it was to be asked
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import combinations
from statistics import fmean

from whet.config.rows import AgreementStage
from whet.data.base import Comparison
from whet.envs.judges.judge import Judge, Preference, as_text, build_judge
from whet.envs.rewards.judge import agreement, failures
from whet.evals.judgement import Decided, Judgement, judge_pairs
from whet.files import write_json
from whet.pipeline.generate import Chunk, Row, comparisons_of, make_rows, questions_seen
from whet.pipeline.stage import ROWS, Context, Kind
from whet.tracking.charts import ROWS_LOOK


def run_agreement(context: Context[AgreementStage]) -> None:
    """Ask about every pair in both orders, then say how often the judge agrees."""
    config, listed = context.config, comparisons_of(context)
    with closing(build_judge(config.judge, context.world.chat(config.judge.model))) as judge:
        make_rows(context, listed, config.chunk, partial(_chunk, judge))
    rows = [json.loads(line) for line in (context.folder / ROWS).read_text(encoding="utf-8").splitlines()]
    asked = _shares([Preference(**row["verdict"]) for row in rows])
    decided = [decision for row in rows if (decision := _decided(row)) is not None]
    found = judge_pairs(decided, tie=0.5) if decided else None
    if found is not None:
        write_json(context.folder / "reward.json", asdict(found) | asked)
    context.console.say(f"{context.name}: {_describe(found, asked, pairs=len(rows))}")


def _chunk(judge: Judge, number: int, chosen: Sequence[Comparison]) -> Chunk:
    pairs = [
        (each.prompt, (as_text(better), as_text(worse)))
        for each in chosen
        for better, worse in combinations(each.answers, 2)
    ]
    found = judge.prefer([asked for asked, _ in pairs], [answers for _, answers in pairs])
    rows = [
        {"prompt": as_text(asked), "better": better, "worse": worse, "verdict": asdict(preference)}
        for (asked, (better, worse)), preference in zip(pairs, found, strict=True)
    ]
    decided = [decision for row in rows if (decision := _decided(row)) is not None]
    right = fmean((d.chance > 0.5) + (d.chance == 0.5) / 2 for d in decided) if decided else float("nan")
    return Chunk(
        rows=rows,
        metrics={"judge/right": right, **{f"judge/{name}": share for name, share in _shares(found).items()}},
        # Words that are no verdict are a finding about the judge; silence is none.
        failures=[each.failure for each in found if each.chance is None and not each.unparsed],
        candidates=len(found),
    )


def _decided(row: Row) -> Decided | None:
    """A row as it was decided; None where no verdict was had."""
    chance = row["verdict"]["chance"]
    lengths = (len(row["better"]), len(row["worse"]))
    return None if chance is None else Decided(prompt=row["prompt"], chance=chance, lengths=lengths)


def _shares(found: Sequence[Preference]) -> dict[str, float]:
    return {**failures(found), **agreement(found)}


def _describe(found: Judgement | None, asked: dict[str, float], *, pairs: int) -> str:
    """`72.4% of 312 pairs decided as is known (95 % interval 68.9% to 75.9%; ...), order flips 3.1%, ...`."""
    silent = f"without a verdict {asked['failed']:.1%} of {pairs:,}, unreadable {asked['unparsed']:.1%}"
    if found is None:
        return f"not one pair was decided; {silent}"
    at = found.accuracy
    return (
        f"{at.mean:.1%} of {found.count:,} pairs decided as is known (95 % interval {at.low:.1%} to {at.high:.1%}, "
        f"{at.questions:,} prompts); a coin has 50 %, 'the longer one is better' {found.baseline.mean:.1%}; "
        f"order flips {asked['order_flips']:.1%}, ties {asked['ties']:.1%}, {silent}"
    )


KIND = Kind(
    config=AgreementStage,
    run=run_agreement,
    check=lambda context: questions_seen(context, context.config.judge, "pairs"),
    needs=lambda config: None,
    look=ROWS_LOOK,
)
