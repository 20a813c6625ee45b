"""One live line for the stage at work; plain lines where there is no terminal. Everything goes to standard error.

A line reads `rl (2 of 3) ━━━━━──── 120/300 1:12 left, about 4:30 of the run  reward 0.830  solved 81%  1.2k tok/s`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from whet.records import Group

# What a line shows, in this order, of what the step has: metric, label, format.
NUMBERS = {
    "reward": ("reward", "{:.3f}"),
    "solved": ("solved", "{:.0%}"),
    "eval_reward": ("held-out reward", "{:.3f}"),
    "eval_solved": ("held out", "{:.0%}"),
    "completions/mean_length": ("length", "{:.0f}"),
    "loss": ("loss", "{:.4g}"),
    "eval_loss": ("eval loss", "{:.4g}"),
    "accuracy": ("right", "{:.0%}"),
    "eval_accuracy": ("held out", "{:.0%}"),
    "rewards/accuracies": ("right", "{:.0%}"),
    "eval_rewards/accuracies": ("held out", "{:.0%}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "entropy": ("entropy", "{:.2f}"),
    "kl": ("kl", "{:.2g}"),
    "grad_norm": ("grad", "{:.2g}"),
}
HELD_OUT = {"eval_loss", "eval_reward", "eval_rewards/accuracies"}
"""Steps with one of these have a line of their own where there is no terminal."""


class Console:
    """A sink for people. `quiet` says nothing at all; without a terminal there is one line every `every` steps."""

    def __init__(self, *, quiet: bool = False, every: int = 10, file: TextIO | None = None) -> None:
        """`file` replaces standard error in tests."""
        self._quiet = quiet
        self._every = every
        self._rich = RichConsole(stderr=True, file=file, highlight=False)
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._total = self._first = 0
        self._began = 0.0
        self._stage = ""
        self._number = ""
        self._work: Mapping[str, int | None] = {}
        self._spent: dict[str, float] = {}

    def plan(self, work: Mapping[str, int | None]) -> None:
        """What a run is to do: its stages in order with how many sequences each trains on or samples (None: unknown).

        From then on a stage is shown with its number and the time that is left of the whole run.
        """
        self._work = work

    def begin(self, stage: str, total: int, *, done: int = 0) -> None:
        """A stage of `total` steps starts, or goes on after `done` of them."""
        self.close()
        self._stage = stage.partition(" ")[0]  # of an evaluation it is the stage and the model
        self._total, self._first, self._began = total, done, time.monotonic()
        place = list(self._work).index(self._stage) + 1 if self._stage in self._work else 0
        self._number = f" ({place} of {len(self._work)})" if place and len(self._work) > 1 else ""
        if self._rich.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16, complete_style="cyan", finished_style="green"),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
                console=self._rich,
                expand=True,
            )
            self._bar = self._progress.add_task(stage + self._number, total=total, completed=done, numbers="")
            self._progress.start()

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Show a step of the stage that `begin` named."""
        numbers = f"{self._time_left(step)}  {line(metrics)}"
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, numbers=numbers)
        elif step % self._every == 0 or step in (self._first + 1, self._total) or not HELD_OUT.isdisjoint(metrics):
            self.say(f"{stage}{self._number}  {step}/{self._total}  {numbers}")

    def say(self, text: str) -> None:
        """One line of text for people, above the live line; never read as markup."""
        if not self._quiet:
            self._rich.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """The stage is over: its line stays, and nothing is live any more."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _time_left(self, step: int) -> str:
        spent = time.monotonic() - self._began
        left = spent / max(1, step - self._first) * (self._total - step)
        after = self._after(spent, step)
        shown = f"{duration(left)} left" if step < self._total else "done"
        return f"{shown}, about {duration(left + after)} of the run" if after else shown

    def _after(self, spent: float, step: int) -> float:
        """Seconds that the stages behind this one take if a sequence takes as long as one did until now; 0: unknown."""
        names = list(self._work)
        later = names[names.index(self._stage) + 1 :] if self._stage in self._work else []
        share = max(1, step - self._first) / max(1, self._total)
        self._spent[self._stage] = max(spent / share, 1e-9)
        to_do = [self._work[name] for name in later]
        done = [(self._spent[name], work) for name in self._spent if (work := self._work.get(name))]
        if not done or None in to_do:
            return 0.0
        return sum(s for s, _ in done) / sum(work for _, work in done) * sum(filter(None, to_do))


def line(metrics: Mapping[str, float]) -> str:
    """The main numbers of a step, in a fixed order; what the step does not have is left out."""
    there = {name: value for name, value in metrics.items() if not math.isnan(value)}
    parts = [f"{label} {form.format(there[name])}" for name, (label, form) in NUMBERS.items() if name in there]
    if "tokens_per_second" in metrics:
        parts.append(f"{_thousands(metrics['tokens_per_second'])} tok/s")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3:05` (minutes) or `2:03:05` (hours)."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
