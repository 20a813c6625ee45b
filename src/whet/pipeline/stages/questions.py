"""The question stage: comparisons become questions with known verdicts, to train a judge on (GenRM, 2408.15240)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing

from whet.config.rows import QuestionsStage
from whet.data.base import Comparison
from whet.envs.judges.judge import build_wording
from whet.envs.judges.questions import Known, Taught, questions, teach
from whet.pipeline.generate import Chunk, Row, comparisons_of, make_rows, questions_seen
from whet.pipeline.stage import Context, Kind
from whet.tracking.charts import ROWS_LOOK


def run_questions(context: Context[QuestionsStage]) -> None:
    """Write the questions, each with what to imitate."""
    config, listed, wording = context.config, comparisons_of(context), build_wording(context.config.wording)
    with ExitStack() as opened:
        teacher = None if config.teacher is None else opened.enter_context(closing(context.world.chat(config.teacher)))

        def chunk(number: int, chosen: Sequence[Comparison]) -> Chunk:
            form, reasoning = config.form, config.wording.reasoning
            asked = [known for each in chosen for known in questions(each, wording, form=form, reasoning=reasoning)]
            if teacher is None:
                return Chunk(rows=[_row(known, f"Verdict: {known.verdict}") for known in asked], metrics={})
            return _taught(asked, teach(teacher, asked, max_tokens=config.max_tokens))

        make_rows(context, listed, config.chunk, chunk)


def _taught(asked: Sequence[Known], taught: Sequence[Taught]) -> Chunk:
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


KIND = Kind(
    config=QuestionsStage,
    run=run_questions,
    check=lambda context: questions_seen(context, context.config.wording, context.config.form),
    needs=lambda config: None,
    look=ROWS_LOOK,
)
