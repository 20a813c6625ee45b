"""Tracking: files that are the truth about a run, and the ways of showing them."""

from whet.tracking.base import Sink
from whet.tracking.console import Console
from whet.tracking.log import Rollout, RunLog, read_metrics, read_notes, read_rollouts, rollout_steps
from whet.tracking.report import write_report
from whet.tracking.sinks import RunInfo, open_sink

__all__ = [
    "Console",
    "Rollout",
    "RunInfo",
    "RunLog",
    "Sink",
    "open_sink",
    "read_metrics",
    "read_notes",
    "read_rollouts",
    "rollout_steps",
    "write_report",
]
