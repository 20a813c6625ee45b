"""The report of a run at work: a sink that draws the page again now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from whet.records import Group

FIRST_S, EVERY_S = 5.0, 15.0
"""Seconds until it is drawn for the first time, and between two drawings at least."""
SHARE = 0.03
"""Of the time that drawing may take."""


class LiveReport:
    """Draws when it hears of a step or is asked, and it is time; one that fails harms no run."""

    def __init__(self, draw: Callable[[], object], say: Callable[[str], None]) -> None:
        """`draw` writes the page; `say` hears why it could not, once."""
        self._draw, self._say, self._failed = draw, say, False
        self._due = time.monotonic() + FIRST_S

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """A step was logged."""
        self.consider()

    def consider(self) -> None:
        """Draw if it is time."""
        began = time.monotonic()
        if began < self._due:
            return
        try:
            self._draw()
        except Exception as error:  # noqa: BLE001 - a drawing is no reason to end a run
            if not self._failed:
                self._say(f"the report could not be drawn ({type(error).__name__}: {error}); the run goes on")
            self._failed = True
        now = time.monotonic()
        self._due = now + max(EVERY_S, (now - began) / SHARE)

    def close(self) -> None:
        """Nothing is open."""
