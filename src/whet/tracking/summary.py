"""What a run came to, in sentences: the verdict on top of the report, a line for each stage, the key figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from whet.tracking.charts import Lines, Look, ends, points
from whet.tracking.svg import moving_mean
from whet.tracking.text import THIN, counted, number, percent, seconds
from whet.tracking.text import points as signed


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalLine:
    """A row of an evaluation table, as read from `eval.json`."""

    label: str
    accuracy: float
    low: float
    high: float
    mean_length: float
    truncated: float
    samples: int
    tasks: int
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    unscored: int = 0
    of_k: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What k answers come to, by k: `pass`, `maj`, `best NAME`."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """The mean of each."""
    detectable: float | None = None
    """The smallest true gain that its questions show four times of five."""
    step: float | None = None
    """Accuracy minus that of the row before."""
    step_low: float | None = None
    step_high: float | None = None
    model: str = ""
    thinking: int | None = None
    """Of a model that answered under several budgets: its own label, and the tokens that it could think for."""

    @property
    def gain_text(self) -> str:
        """`+55 points, 95 % interval +51 to +59`; empty for the row that others are compared with."""
        if self.gain is None or self.gain_low is None or self.gain_high is None:
            return ""
        return f"{signed(self.gain)} points, 95{THIN}% interval {signed(self.gain_low)} to {signed(self.gain_high)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """What the report knows of one stage."""

    name: str
    kind: str
    look: Look
    state: str
    """done, running (a manifest is not there yet), waiting (not begun) or not run (its loop ended before)."""
    planned: int | None
    """Steps that the recipe asks for, where it says so."""
    lines: Lines = ()
    rows: tuple[EvalLine, ...] = ()

    @property
    def baseline(self) -> EvalLine:
        """The row that the last one's gain is over: one without a gain, of its budget where each budget has one."""
        firsts = [row for row in self.rows if row.gain is None] or self.rows
        return next((row for row in firsts if row.thinking == self.rows[-1].thinking), firsts[0])

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(max((line["step"] or 0 for line in self.lines), default=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A tile: what, how much, and how it came there."""

    name: str
    value: str
    note: str


def verdict(stages: tuple[StageView, ...], failure: str = "") -> str:
    """The run in one sentence: why it failed, else the last comparison, else what training showed."""
    if failure:
        at = [stage for stage in stages if stage.state == "running"]
        where = f" in {at[-1].name}, after {counted(at[-1].steps, 'step')}" if at else ""
        return f"Failed{where}: {failure}"
    compared = [stage for stage in stages if len(stage.rows) > 1]
    if compared:
        return _comparison(compared[-1].baseline, compared[-1].rows[-1])
    trained = [(stage, _change(stage)) for stage in stages]
    told = [(stage, change) for stage, change in trained if change]
    if not told:
        return "The run has no numbers yet."
    stage, change = told[-1]
    alone = [s.rows[0] for s in stages if s.rows]
    held_out = f"held-out accuracy is {percent(alone[-1].accuracy)}" if alone else "nothing was evaluated yet"
    return f"{change[0].upper()}{change[1:]} over {counted(stage.steps, 'step')} of {stage.name}; {held_out}."


def stage_line(stage: StageView) -> str:
    """What happened in a stage, in one line."""
    if stage.rows:
        return f"{stage.rows[0].tasks:,} held-out tasks, {stage.rows[0].samples} sampled answers each."
    if stage.look.makes_rows:
        rows = sum(int(line.get("rows") or 0) for line in stage.lines)
        return f"{counted(rows, 'row')} from {counted(stage.steps, 'chunk')} of tasks." if stage.steps else ""
    parts = [part for part in (_change(stage), _signal(stage)) if part]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def stage_note(stage: StageView) -> str:
    """How far a stage is, or what it came to, in a few words."""
    if stage.state in ("waiting", "not run"):
        return stage.state
    if stage.state == "running":
        return f"step {stage.steps:,} of {stage.planned:,}" if stage.planned else "unfinished"
    if stage.rows:
        last = stage.rows[-1]
        return f"{last.label} {percent(last.accuracy)}"
    spent = duration_s(stage)
    parts = [counted(stage.steps, "step")] if stage.steps else ["done"]
    return ", ".join([*parts, *([seconds(spent)] if spent else [])])


def figures(stages: tuple[StageView, ...]) -> list[Figure]:
    """The tiles under the verdict."""
    tiles = []
    compared = [stage for stage in stages if len(stage.rows) > 1]
    if compared:
        first, last = compared[-1].baseline, compared[-1].rows[-1]
        span = f"95{THIN}% interval {percent(last.low)} to {percent(last.high)}"
        tiles.append(Figure(name="Held-out accuracy", value=percent(last.accuracy), note=span))
        if last.gain is not None and last.gain_low is not None and last.gain_high is not None:
            span = f"points over {first.label}, {signed(last.gain_low)} to {signed(last.gain_high)}"
            tiles.append(Figure(name="Paired gain", value=signed(last.gain), note=span))
        length = f"tokens, from {number(first.mean_length)}"
        tiles.append(Figure(name="Mean answer", value=number(last.mean_length), note=length))
    trained = [stage for stage in stages if stage.steps and not stage.look.makes_rows]
    if trained:
        total = sum(stage.steps for stage in trained)
        split = " + ".join(f"{stage.steps:,} {stage.name}" for stage in trained)
        tiles.append(Figure(name="Training steps", value=f"{total:,}", note=split))
        spent = sum(duration_s(stage) for stage in trained)
        if spent:
            tiles.append(Figure(name="Time in steps", value=seconds(spent), note="without loading and evaluation"))
    return tiles


def duration_s(stage: StageView) -> float:
    """Seconds that the stage's steps took: the sum of their phases, so that a pause between resumes does not count."""
    phases = [value for line in stage.lines for name, value in line.items() if name.startswith("time/")]
    return sum(value for value in phases if value is not None)


def _comparison(first: EvalLine, last: EvalLine) -> str:
    before, after = f"{percent(first.accuracy)} ({first.label})", f"{percent(last.accuracy)} ({last.label})"
    length = _length_change(first.mean_length, last.mean_length)
    if last.gain_low is not None and last.gain_low > 0:
        return f"Held-out accuracy rose from {before} to {after}: {last.gain_text}, while {length}."
    if last.gain_high is not None and last.gain_high < 0:
        return f"Held-out accuracy fell from {before} to {after}: {last.gain_text}, while {length}."
    return f"No measurable change: held-out accuracy went from {before} to {after} ({last.gain_text}), while {length}."


def _length_change(before: float, after: float) -> str:
    if abs(after - before) < 0.05 * before:
        return f"answers kept their length of {number(after)} tokens"
    return f"answers {'grew' if after > before else 'shrank'} from {number(before)} to {number(after)} tokens"


def _change(stage: StageView) -> str:
    """How the stage's main number went, as its curve is drawn; no claim that the change is real."""
    for metric, name, show in stage.look.headline:
        curve = points(stage.lines, metric)
        if curve:
            first, last = ends(curve)
            return f"{name} went from {show(first)} to {show(last)}"
    return ""


def _signal(stage: StageView) -> str:
    """How many groups taught nothing lately, and why."""
    right = points(stage.lines, "frac_groups_all_right")
    wrong = points(stage.lines, "frac_groups_all_wrong")
    if not right or not wrong:
        return ""
    (_, easy), (_, hard) = moving_mean(right)[-1], moving_mean(wrong)[-1]  # as the chart is stacked
    why = f"{percent(easy)} all right, {percent(hard)} all wrong"
    return f"lately {percent(easy + hard)} of groups carry no signal ({why})"
