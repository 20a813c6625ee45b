"""Which metrics make which chart.

The catalogue below is the report's table of contents; a chart without data is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from whet.tracking.svg import Axis, Series, line_chart, stacked_chart
from whet.tracking.text import number, seconds, share

Lines = Sequence[Mapping[str, float | None]]
"""The lines of a `metrics.jsonl`."""

TONES = ("blue", "orange", "green", "violet", "teal", "gold", "red", "grey")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric in a chart. `rewards/*` stands for every metric of that form, each named by what `*` stands for."""

    metric: str
    label: str = ""
    tone: str = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One card of the report."""

    title: str
    caption: str
    axis: Axis
    curves: tuple[Curve, ...]
    stacked: bool = False
    band: tuple[str, str] | None = None
    """Metrics of the lower and upper edge of a shaded range."""
    kinds: tuple[str, ...] = ("sft", "preference", "online_preference", "reward_model", "rl")
    """Kinds of stage in which it means something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A drawn card."""

    title: str
    caption: str
    svg: str
    now: str
    """Its first curve at the end (a mean over the last steps); for a stack the sum."""
    before: str
    """The same at the beginning."""
    legend: tuple[tuple[str, str], ...]
    """(label, tone) of each curve, where a title is not enough."""


def _share(label: str, *, ceiling: float | None = None) -> Axis:
    return Axis(label=label, show=share, floor=0.0, ceiling=ceiling)


def _amount(label: str, *, floor: float | None = 0.0, log: bool = False) -> Axis:
    return Axis(label=label, show=number, floor=floor, log=log)


LOSSES = (Curve(metric="loss", label="training"), Curve(metric="eval_loss", label="held out", tone="orange"))

CATALOGUE: Mapping[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart(
            title="Loss",
            caption="Mean over trained tokens. Held-out loss that turns up while training loss falls is overfitting.",
            axis=_amount("nats per token", floor=None),
            curves=LOSSES,
            kinds=("sft",),
        ),
        Chart(
            title="Loss",
            caption="Mean over comparisons, labels or ratings. A pair that is not told apart costs log 2 = 0.693; a "
            "rating that is taken for the mean costs 1 on average.",
            axis=_amount("loss", floor=None),
            curves=LOSSES,
            kinds=("reward_model",),
        ),
        Chart(
            title="Objectives",
            caption="Squared error of held-out ratings: 1 is what their mean has.",
            axis=_amount("squared error"),
            curves=(Curve(metric="eval_loss/*"),),
            kinds=("reward_model",),
        ),
        Chart(
            title="Accuracy",
            caption="Pairs (or labels) that the scores decide rightly; a tie is wrong.",
            axis=_share("share", ceiling=1.0),
            curves=(
                Curve(metric="accuracy", label="training"),
                Curve(metric="eval_accuracy", label="held out", tone="orange"),
                Curve(metric="ties", label="ties", tone="grey"),
            ),
            kinds=("reward_model",),
        ),
        Chart(
            title="Margin",
            caption="Score of the better answer minus the worse one's. Growth without accuracy is overconfidence.",
            axis=_amount("log-odds", floor=None),
            curves=(Curve(metric="margin", label="margin", tone="teal"),),
            kinds=("reward_model",),
        ),
        Chart(
            title="Loss",
            caption="Mean over pairs or judged answers. DPO begins at log 2 = 0.693.",
            axis=_amount("loss", floor=None),
            curves=LOSSES,
            kinds=("preference", "online_preference"),
        ),
        Chart(
            title="Implicit rewards",
            caption="What the loss takes the answers to be worth: the better ones should rise over the worse ones.",
            axis=_amount("reward", floor=None),
            curves=(
                Curve(metric="rewards/chosen", label="better", tone="green"),
                Curve(metric="rewards/rejected", label="worse", tone="red"),
                Curve(metric="rewards/margins", label="margin"),
                Curve(metric="eval_rewards/margins", label="margin, held out", tone="orange"),
            ),
            kinds=("preference", "online_preference"),
        ),
        Chart(
            title="Pairs in the right order",
            caption="By implicit reward; a tie counts as wrong, so the first step says little.",
            axis=_share("share of pairs", ceiling=1.0),
            curves=(
                Curve(metric="rewards/accuracies", label="training", tone="green"),
                Curve(metric="eval_rewards/accuracies", label="held out", tone="orange"),
            ),
            kinds=("preference", "online_preference"),
        ),
        Chart(
            title="Log-probability of answers",
            caption="Both often fall. Where the better answers fall far, too, the policy forgets how to write them.",
            axis=_amount("nats", floor=None),
            curves=(
                Curve(metric="logps/chosen", label="better", tone="green"),
                Curve(metric="logps/rejected", label="worse", tone="red"),
            ),
            kinds=("preference", "online_preference"),
        ),
        Chart(
            title="Reward",
            caption="Mean over the step's scored answers, with the parts that it is made of.",
            axis=_amount("reward", floor=None),
            curves=(Curve(metric="reward", label="reward"), Curve(metric="rewards/*")),
        ),
        Chart(
            title="Parts of rewards",
            caption="What rewards say beside their value: single objectives, the spread of an ensemble.",
            axis=_amount("value", floor=None),
            curves=(Curve(metric="rewards/*/*"),),
            kinds=("online_preference", "rl"),
        ),
        Chart(
            title="Gate",
            caption="What each objective counts for by the prompt, mean over answers.",
            axis=_share("weight", ceiling=1.0),
            curves=(Curve(metric="rewards/*/gate/*"),),
            kinds=("online_preference", "rl"),
        ),
        Chart(
            title="Solved",
            caption="Sampled answers that are right, on training tasks.",
            axis=_share("share of answers", ceiling=1.0),
            curves=(Curve(metric="solved", label="solved", tone="green"),),
        ),
        Chart(
            title="Groups without signal",
            caption="All answers right: too easy. All wrong: too hard. Neither moves the policy.",
            axis=_share("share of groups", ceiling=1.0),
            curves=(
                Curve(metric="frac_groups_all_right", label="all right", tone="green"),
                Curve(metric="frac_groups_all_wrong", label="all wrong", tone="red"),
            ),
            stacked=True,
        ),
    ),
    "Policy": (
        Chart(
            title="Entropy",
            caption="How undecided the policy is. Near zero it has stopped exploring.",
            axis=_amount("nats per token"),
            curves=(Curve(metric="entropy", label="entropy", tone="violet"),),
        ),
        Chart(
            title="KL to the start",
            caption="Distance from the policy that the stage began with.",
            axis=_amount("nats per token"),
            curves=(Curve(metric="kl", label="KL", tone="violet"),),
        ),
        Chart(
            title="Clipped tokens",
            caption="Tokens whose probability ratio left the trust region, below and above.",
            axis=_share("share of tokens"),
            curves=(
                Curve(metric="clip_ratio/low_mean", label="low", tone="teal"),
                Curve(metric="clip_ratio/high_mean", label="high", tone="orange"),
            ),
        ),
        Chart(
            title="Sampler\N{EN DASH}trainer gap",
            caption="|log p| difference at equal weights. Numerical noise only; growth is a bug.",
            axis=_amount("nats per token, log scale", log=True),
            curves=(
                Curve(metric="sampling/logp_gap_mean", label="mean", tone="blue"),
                Curve(metric="sampling/logp_gap_max", label="largest", tone="red"),
            ),
        ),
        Chart(
            title="Gradient norm",
            caption="Before clipping.",
            axis=_amount("norm"),
            curves=(Curve(metric="grad_norm", label="norm", tone="teal"),),
        ),
        Chart(
            title="Learning rate",
            caption="What the optimizer was given.",
            axis=_amount("learning rate"),
            curves=(Curve(metric="lr", label="rate", tone="grey"),),
        ),
    ),
    "Answers": (
        Chart(
            title="Answer length",
            caption="Mean, and the range from the shortest to the longest.",
            axis=_amount("tokens"),
            curves=(
                Curve(metric="completions/mean_length", label="mean"),
                Curve(metric="reflection/mean_length", label="with reflection", tone="violet"),
            ),
            band=("completions/min_length", "completions/max_length"),
        ),
        Chart(
            title="Truncated",
            caption="Answers that the token budget cut off.",
            axis=_share("share of answers"),
            curves=(Curve(metric="completions/clipped_ratio", label="truncated", tone="red"),),
        ),
        Chart(
            title="Reflection",
            caption="Answers with words such as \N{LEFT DOUBLE QUOTATION MARK}wait\N{RIGHT DOUBLE QUOTATION MARK} or "
            "\N{LEFT DOUBLE QUOTATION MARK}check\N{RIGHT DOUBLE QUOTATION MARK}.",
            axis=_share("share of answers"),
            curves=(Curve(metric="reflection/share", label="with reflection", tone="violet"),),
        ),
        Chart(
            title="Outcomes other than finished",
            caption="Failures are counted here and never become a reward of zero.",
            axis=_amount("episodes per step"),
            curves=(Curve(metric="outcomes/*"),),
            stacked=True,
        ),
    ),
    "Machine": (
        Chart(
            title="Time per step",
            caption="By phase.",
            axis=Axis(label="seconds", show=seconds, floor=0.0),
            curves=(Curve(metric="time/*"),),
            stacked=True,
        ),
        Chart(
            title="Throughput",
            caption="Tokens per second of the whole loop.",
            axis=_amount("tokens per second"),
            curves=(Curve(metric="tokens_per_second", label="tokens per second", tone="teal"),),
        ),
    ),
}
HIDDEN = {"step", "time_s", "num_tokens", "outcomes/finished"}
"""Not worth a curve: clocks, counters, and the complement of what is shown."""
FEW = 7
"""Cards that need no headings between them."""


def panels(lines: Lines, kind: str) -> dict[str, list[Panel]]:
    """The cards of a stage, by section; a stage with few has one section without a name.

    Whatever the catalogue does not know comes last under `More`.
    """
    known = _names(lines) - HIDDEN
    sections: dict[str, list[Panel]] = {}
    for section, charts in CATALOGUE.items():
        for chart in (chart for chart in charts if kind in chart.kinds):
            panel = _draw(chart, lines, known)
            if panel is not None:
                sections.setdefault(section, []).append(panel)
            known -= _used(chart, known)
    if 0 < sum(len(cards) for cards in sections.values()) <= FEW:
        sections = {"": [card for cards in sections.values() for card in cards]}
    for name in sorted(known):
        axis = _amount("", floor=None)
        plain = Chart(title=name, caption="", axis=axis, curves=(Curve(metric=name, label=name, tone="grey"),))
        panel = _draw(plain, lines, known)
        if panel is not None:
            sections.setdefault("More", []).append(panel)
    return sections


def points(lines: Lines, metric: str) -> tuple[tuple[float, float], ...]:
    """The metric's (step, value) points, where it is there and finite; the last line of a step counts."""
    found = {line["step"]: line.get(metric) for line in lines if line.get(metric) is not None}
    return tuple((float(step), float(value)) for step, value in found.items() if step is not None and value is not None)


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the first tenth of the values and of the last, at most ten each."""
    count = max(1, min(10, len(values) // 10))
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _names(lines: Lines) -> set[str]:
    return {name for line in lines for name, value in line.items() if value is not None}


def _matching(metric: str, names: Iterable[str]) -> list[str]:
    form = re.compile(re.escape(metric).replace(r"\*", "[^/]+"))
    return sorted(name for name in names if form.fullmatch(name))


def _used(chart: Chart, names: set[str]) -> set[str]:
    metrics = [*(curve.metric for curve in chart.curves), *(chart.band or ())]
    return {name for metric in metrics for name in _matching(metric, names)}


def _draw(chart: Chart, lines: Lines, names: set[str]) -> Panel | None:
    series = _series(chart, lines, names)
    if not series:
        return None
    if chart.stacked:
        # Hidden metrics count here: at a step where all episodes finished, none failed.
        steps = {line["step"] for line in lines if _used(chart, _names([line]))}
        series = _filled(series, sorted(float(step) for step in steps if step is not None))
        if not any(y for s in series for _, y in s.points):
            return None
        svg = stacked_chart(series, chart.axis)
        first, last = ends([sum(parts) for parts in zip(*([y for _, y in s.points] for s in series), strict=True)])
    else:
        edges = [Series(name=m.rpartition("/")[2].replace("_", " "), points=points(lines, m), tone="blue")
                 for m in chart.band or ()]  # fmt: skip
        band = (edges[0], edges[1]) if edges and all(edge.points for edge in edges) else None
        svg = line_chart(series, chart.axis, band=band)
        first, last = ends([y for _, y in series[0].points])
    return Panel(
        title=chart.title,
        caption=chart.caption,
        svg=svg,
        now=chart.axis.show(last),
        before=chart.axis.show(first),
        legend=tuple((s.name, s.tone) for s in series) if len(series) > 1 or chart.stacked else (),
    )


def _series(chart: Chart, lines: Lines, names: set[str]) -> list[Series]:
    """The chart's curves that have points; those of a `*` take the tones that the others left."""
    series: list[Series] = []
    for curve in chart.curves:
        spare = [tone for tone in TONES if tone not in {s.tone for s in series}]
        for index, name in enumerate(_matching(curve.metric, names)):
            several = "*" in curve.metric
            label = name[curve.metric.index("*") :].replace("_", " ") if several else curve.label
            tone = spare[index % len(spare)] if several else curve.tone
            series.append(Series(name=label, points=points(lines, name), tone=tone))
    return [s for s in series if s.points]


def _filled(series: list[Series], steps: Sequence[float]) -> list[Series]:
    """The same series, the largest first, with 0 at the other `steps`: what did not happen took nothing."""
    series = sorted(series, key=lambda s: -sum(y for _, y in s.points))
    filled = []
    for s in series:
        value = dict(s.points)
        filled.append(
            Series(name=s.name, points=tuple((x, value[x] if x in value else 0.0) for x in steps), tone=s.tone)
        )
    return filled
