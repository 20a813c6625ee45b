"""How far a GRPO step walks through the code: the files that it executes, and the calls to a reward model's score.

    python -m benchmarks.footstep [--functions]

A file counts where Python code of it runs between two `Step`s of `policy_gradient`, in any thread; what the runner
does between steps (log, report, checkpoint) is not in it. A score's way is the stack of our functions from the player,
which asks for grades, down to the head that gives the number.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import whet
from whet.algorithms.policy import policy_gradient
from whet.models.language import LanguageModel
from whet.pipeline.stages import rl
from whet.records import Step
from whet.rollouts.play import Player

ROOT = Path(whet.__file__).parent
INLINE = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")
SCORES = {"kind": "reward_model", "data": {"generate": "arithmetic", "count": 16, "answers": 2}, "train": {"steps": 1}}
GRPO = {
    "kind": "rl", "algorithm": {"preset": "grpo"}, "tasks": {"generate": "arithmetic", "count": 64},
    "prompts_per_step": 8, "rollouts_per_prompt": 8, "sampling": {"max_tokens": 16}, "train": {"steps": 3, "lr": 1e-4},
}  # fmt: skip
STAGES = {
    "rm": SCORES,
    "verified": {**GRPO, "rewards": [{"kind": "verifier"}]},
    "scored": {**GRPO, "rewards": [{"kind": "model", "path": "@rm"}]},
}


class Walk:
    """What runs, by file, in each step; and how a score was reached."""

    def __init__(self) -> None:
        self.steps: list[dict[str, set[str]]] = []
        self.way: list[str] = []
        self._step: dict[str, set[str]] | None = None

    def watched(self, *args: Any, **options: Any) -> Iterator[Step]:
        """`policy_gradient`, with what runs in each of its steps noted."""
        steps = policy_gradient(*args, **options)
        while True:
            self._step = found = defaultdict(set)
            step = next(steps, None)
            self._step = None
            if step is None:
                return
            self.steps.append(found)
            yield step

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        if event == "call" and self._step is not None and (file := _file(frame)):
            self._step[file].add(frame.f_code.co_qualname)
            if frame.f_code is LanguageModel.head_at.__code__:
                self.way = _way(frame) or self.way


def _file(frame: FrameType) -> str:
    """Below our package; '' for code of others, and for comprehensions, which are no functions."""
    code = frame.f_code
    if not code.co_filename.startswith(str(ROOT)) or code.co_name in (
        "<listcomp>",
        "<genexpr>",
        "<dictcomp>",
        "<setcomp>",
    ):
        return ""
    return code.co_filename.removeprefix(f"{ROOT}/")


def _way(frame: FrameType) -> list[str]:
    """The distinct functions from the player to here, as `FILE:FUNCTION`; none where no player asked."""
    found: list[str] = []
    at: FrameType | None = frame
    while at is not None:
        if file := _file(at):
            found.append(f"{file}:{at.f_code.co_qualname}")
        if at.f_code is Player._grade.__code__:
            return list(dict.fromkeys(reversed(found)))
        at = at.f_back
    return []


def main() -> None:
    """Print both."""
    walk = Walk()
    rl.policy_gradient = walk.watched
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"name": "footstep", "out": folder, "model": "whet:demo", "threads": 1, "stages": STAGES}
        threading.setprofile(walk.note)
        sys.setprofile(walk.note)
        try:
            whet.run(recipe, quiet=True)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    step = walk.steps[len(walk.steps) // 2 - 1]  # the last with a verifier: nothing is made anew
    shown = "--functions" in sys.argv
    lines = [f"{file}  {', '.join(sorted(step[file])) if shown else len(step[file])}" for file in sorted(step)]
    report = [f"{len(step)} files in a GRPO step", *lines, f"{len(walk.way)} functions to a score", *walk.way]
    sys.stdout.write("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
