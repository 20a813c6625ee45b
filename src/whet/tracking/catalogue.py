"""Which metrics make which chart: the report's table of contents, as data.

A kind of stage names the groups that it draws; a chart without data is left out.
"""

from __future__ import annotations

from whet.tracking.charts import Chart, Curve
from whet.tracking.svg import Axis
from whet.tracking.text import number, seconds, share


def _share(label: str, *, ceiling: float | None = None) -> Axis:
    return Axis(label=label, show=share, floor=0.0, ceiling=ceiling)


def _amount(label: str, *, floor: float | None = 0.0, log: bool = False) -> Axis:
    return Axis(label=label, show=number, floor=floor, log=log)


LOSSES = (Curve(metric="loss", label="training"), Curve(metric="eval_loss", label="held out", tone="orange"))

IMITATION = (
    Chart(
        title="Loss",
        caption="Mean over trained tokens. Held-out loss that turns up while training loss falls is overfitting.",
        axis=_amount("nats per token", floor=None),
        curves=LOSSES,
    ),
)
"""Of learning from rows."""

JUDGEMENT = (
    Chart(
        title="Loss",
        caption="Mean over comparisons, labels or ratings. A pair that is not told apart costs log 2 = 0.693; a "
        "rating that is taken for the mean costs 1 on average.",
        axis=_amount("loss", floor=None),
        curves=LOSSES,
    ),
    Chart(
        title="Objectives",
        caption="Squared error of held-out ratings: 1 is what their mean has.",
        axis=_amount("squared error"),
        curves=(Curve(metric="eval_loss/*"),),
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
    ),
    Chart(
        title="Margin",
        caption="Score of the better answer minus the worse one's. Growth without accuracy is overconfidence.",
        axis=_amount("log-odds", floor=None),
        curves=(Curve(metric="margin", label="margin", tone="teal"),),
    ),
)
"""Of a reward model."""

PREFERENCES = (
    Chart(
        title="Loss",
        caption="Mean over pairs or judged answers. DPO begins at log 2 = 0.693.",
        axis=_amount("loss", floor=None),
        curves=LOSSES,
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
    ),
    Chart(
        title="Pairs in the right order",
        caption="By implicit reward; a tie counts as wrong, so the first step says little.",
        axis=_share("share of pairs", ceiling=1.0),
        curves=(
            Curve(metric="rewards/accuracies", label="training", tone="green"),
            Curve(metric="eval_rewards/accuracies", label="held out", tone="orange"),
        ),
    ),
    Chart(
        title="Log-probability of answers",
        caption="Both often fall. Where the better answers fall far, too, the policy forgets how to write them.",
        axis=_amount("nats", floor=None),
        curves=(
            Curve(metric="logps/chosen", label="better", tone="green"),
            Curve(metric="logps/rejected", label="worse", tone="red"),
        ),
    ),
)
"""Of learning from comparisons."""

TRAINING = (
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
    ),
    Chart(
        title="Gate",
        caption="What each objective counts for by the prompt, mean over answers.",
        axis=_share("weight", ceiling=1.0),
        curves=(Curve(metric="rewards/*/gate/*"),),
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
    Chart(
        section="Policy",
        title="Entropy",
        caption="How undecided the policy is. Near zero it has stopped exploring.",
        axis=_amount("nats per token"),
        curves=(Curve(metric="entropy", label="entropy", tone="violet"),),
    ),
    Chart(
        section="Policy",
        title="KL to the start",
        caption="Distance from the policy that the stage began with.",
        axis=_amount("nats per token"),
        curves=(Curve(metric="kl", label="KL", tone="violet"),),
    ),
    Chart(
        section="Policy",
        title="Clipped tokens",
        caption="Tokens whose probability ratio left the trust region, below and above.",
        axis=_share("share of tokens"),
        curves=(
            Curve(metric="clip_ratio/low_mean", label="low", tone="teal"),
            Curve(metric="clip_ratio/high_mean", label="high", tone="orange"),
        ),
    ),
    Chart(
        section="Policy",
        title="Sampler\N{EN DASH}trainer gap",
        caption="|log p| difference at equal weights. Numerical noise only; growth is a bug.",
        axis=_amount("nats per token, log scale", log=True),
        curves=(
            Curve(metric="sampling/logp_gap_mean", label="mean", tone="blue"),
            Curve(metric="sampling/logp_gap_max", label="largest", tone="red"),
        ),
    ),
    Chart(
        section="Policy",
        title="Gradient norm",
        caption="Before clipping.",
        axis=_amount("norm"),
        curves=(Curve(metric="grad_norm", label="norm", tone="teal"),),
    ),
    Chart(
        section="Policy",
        title="Learning rate",
        caption="What the optimizer was given.",
        axis=_amount("learning rate"),
        curves=(Curve(metric="lr", label="rate", tone="grey"),),
    ),
    Chart(
        section="Answers",
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
        section="Answers",
        title="Truncated",
        caption="Answers that the token budget cut off.",
        axis=_share("share of answers"),
        curves=(Curve(metric="completions/clipped_ratio", label="truncated", tone="red"),),
    ),
    Chart(
        section="Answers",
        title="Reflection",
        caption="Answers with words such as \N{LEFT DOUBLE QUOTATION MARK}wait\N{RIGHT DOUBLE QUOTATION MARK} or "
        "\N{LEFT DOUBLE QUOTATION MARK}check\N{RIGHT DOUBLE QUOTATION MARK}.",
        axis=_share("share of answers"),
        curves=(Curve(metric="reflection/share", label="with reflection", tone="violet"),),
    ),
    Chart(
        section="Answers",
        title="Outcomes other than finished",
        caption="Failures are counted here and never become a reward of zero.",
        axis=_amount("episodes per step"),
        curves=(Curve(metric="outcomes/*"),),
        stacked=True,
    ),
    Chart(
        section="Machine",
        title="Time per step",
        caption="By phase.",
        axis=Axis(label="seconds", show=seconds, floor=0.0),
        curves=(Curve(metric="time/*"),),
        stacked=True,
    ),
    Chart(
        section="Machine",
        title="Throughput",
        caption="Tokens per second of the whole loop.",
        axis=_amount("tokens per second"),
        curves=(Curve(metric="tokens_per_second", label="tokens per second", tone="teal"),),
    ),
)
"""Of every stage that trains; a chart without data is left out."""
