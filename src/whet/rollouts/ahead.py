"""Answers are graded while others are still sampled, where a rubric can do that and its rewards are slow.

One call at a time, in a thread, of all episodes that have ended since the last one began. What has not been asked for
when the last episode ends is graded with all that has to wait for it; the scores are the same either way.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial

from whet.envs.base import Attempt
from whet.envs.rubric import Ahead, WeightedRubric
from whet.errors import GraderError, UserError, boundary
from whet.sampling.base import aside

GRADING = threading.Lock()
"""One rubric grades at a time: training and an evaluation in another thread may ask the same model."""


class GradesAhead:
    """What is known of the attempts of one play, by their number."""

    def __init__(self, rubric: WeightedRubric, *, step: int) -> None:
        self.known: dict[int, Ahead] = {}
        self._rubric, self._step = rubric, step
        self._waiting: list[tuple[int, Attempt]] = []
        self._work: asyncio.Task[None] | None = None

    def add(self, number: int, attempt: Attempt) -> None:
        """An episode has ended."""
        self._waiting.append((number, attempt))
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._grade())

    async def end(self) -> None:
        """No more are graded ahead. Raises nothing: what the rubric raised, it raises again when all are graded."""
        self._waiting.clear()
        if self._work is not None:
            await asyncio.wait([self._work])

    def cancel(self) -> None:
        """The play was given up."""
        self._waiting.clear()
        if self._work is not None:
            self._work.cancel()

    async def _grade(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting, []
            attempts: Sequence[Attempt] = [attempt for _, attempt in some]
            try:
                with boundary(GraderError, "the rubric failed"):
                    said = await aside(partial(self._ask, attempts))
            except UserError:  # of which `GraderError` is one
                return
            self.known.update(zip((number for number, _ in some), said, strict=True))

    def _ask(self, attempts: Sequence[Attempt]) -> Sequence[Ahead]:
        with GRADING:
            return self._rubric.ahead(attempts, step=self._step)
