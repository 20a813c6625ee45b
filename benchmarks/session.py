"""A timed process: it works when the driver says so, and prints one JSON line for each step.

The driver writes a line for each step that it wants; the clock runs from then until `done`. So two processes that
stay alive side by side take turns, and whatever else the machine does meanwhile hits both.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Session:
    """The worker's end of the line. What libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._wall = self._cpu = 0.0
        self._peak_mb = 0

    def ready(self, **facts: Any) -> None:
        """Say that everything is loaded."""
        self._print(ready=True, rss_mb=_peak_mb(), **facts)

    def wait(self) -> bool:
        """Block until the next step is wanted and start the clock; False: there is none."""
        wanted = bool(sys.stdin.readline())
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return wanted

    def done(self, **facts: Any) -> None:
        """Stop the clock and report the step."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._print(wall_s=wall, cpu_s=cpu, **facts)

    def worked(self) -> None:
        """The timed work is over: what follows does not count as its peak memory."""
        self._peak_mb = _peak_mb()

    def finish(self, **facts: Any) -> None:
        """The last line."""
        self._print(peak_rss_mb=self._peak_mb, **facts)

    def _print(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()


def _peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
