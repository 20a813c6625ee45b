"""The tracking door: sinks receive every step.

The files of `tracking.log` are the truth; sinks only repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from whet.records import Group


class Sink(Protocol):
    """Gets every step, in order. After a resume the steps since the last checkpoint come again."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """One optimizer step of a stage: its numbers, and the episodes that it was made from (none for SFT)."""
