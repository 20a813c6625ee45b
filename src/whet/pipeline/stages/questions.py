"""The question stage: comparisons become questions with known verdicts, to train a judge on (GenRM, 2408.15240)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whet.config.feedback import QuestionsStage
from whet.data.base import Comparison
from whet.envs.clients import ChatClient
from whet.envs.judges.judge import Wording, build_wording
from whet.envs.judges.questions import Known, questions, teach
from whet.pipeline.generate import Chunk, Row, make_rows, questions_seen
from whet.pipeline.load_data import comparisons
from whet.pipeline.stage import Context, Kind, Seen, keep_dropped
from whet.tracking.charts import Look


def run_questions(context: Context[QuestionsStage]) -> None:
    """Write the questions, each with what to imitate."""
    config = context.config
    listed, unread = comparisons(config.data)
    lost = f"; {unread.describe()}" if unread.any else ""
    keep_dropped(context, "data", [unread])
    context.console.say(f"{context.name}: {len(listed):,} comparisons{lost}")
    teacher = None if config.teacher is None else context.world.chat(config.teacher)
    try:
        make_rows(context, listed, config.chunk, _Ask(config, build_wording(config.wording), teacher).chunk)
    finally:
        if teacher is not None:
            teacher.close()


@dataclass(frozen=True, slots=True)
class _Ask:
    config: QuestionsStage
    wording: Wording
    teacher: ChatClient | None

    def chunk(self, number: int, chosen: Sequence[Comparison]) -> Chunk:
        reasoning = self.config.wording.reasoning
        asked = [
            known
            for comparison in chosen
            for known in questions(comparison, self.wording, form=self.config.form, reasoning=reasoning)
        ]
        if self.teacher is None:
            return Chunk(rows=[_row(known, f"Verdict: {known.verdict}") for known in asked], metrics={})
        taught = teach(self.teacher, asked, max_tokens=self.config.max_tokens)
        rows = [_row(k, t.completion) for k, t in zip(asked, taught, strict=True) if t.completion is not None]
        failed = [each.failure for each in taught if each.failure]
        metrics = {"teacher/failed": float(len(failed)), "teacher/wrong": float(sum(each.wrong for each in taught))}
        return Chunk(rows=rows, metrics=metrics, failures=failed, candidates=len(taught))


def _row(known: Known, completion: str) -> Row:
    return {
        "prompt": [message.as_dict() for message in known.prompt],
        "completion": completion,
        "verdict": known.verdict,
        "task": known.origin,
    }


def check_questions(context: Context[QuestionsStage]) -> Seen:
    """Its comparisons, and the first of its questions."""
    return questions_seen(context.config.data, context.config.wording, context.config.form)


KIND = Kind(
    config=QuestionsStage,
    run=run_questions,
    check=check_questions,
    needs=lambda config: None,
    look=Look(makes_rows=True),
)
