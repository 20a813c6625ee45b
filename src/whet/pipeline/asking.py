"""What stages share that ask about comparisons: the questions that they begin with."""

from __future__ import annotations

from typing import Literal

from whet.config import Source
from whet.config.judge import JudgeWording
from whet.envs.judges.judge import build_wording
from whet.envs.judges.questions import questions
from whet.pipeline.load_data import comparisons
from whet.pipeline.playing import SHOWN
from whet.pipeline.stage import Seen


def questions_seen(source: Source, wording: JudgeWording, form: Literal["pairs", "points"]) -> Seen:
    """The comparisons of a source, and the first of the questions about them."""
    compared, unread = comparisons(source)
    known = list(questions(compared[0], build_wording(wording), form=form, reasoning=wording.reasoning))
    summary = f"{len(compared):,} comparisons; {unread.describe()}"
    return Seen(summary=summary, prompts=[each.prompt for each in known[:SHOWN]])
