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


LOSSES = (Curve("loss", "training"), Curve("eval_loss", "held out", "orange"))

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
        curves=(Curve("eval_loss/*"),),
    ),
    Chart(
        title="Accuracy",
        caption="Pairs (or labels) that the scores decide rightly; a tie is wrong.",
        axis=_share("share", ceiling=1.0),
        curves=(
            Curve("accuracy", "training"),
            Curve("eval_accuracy", "held out", "orange"),
            Curve("ties", "ties", "grey"),
        ),
    ),
    Chart(
        title="Margin",
        caption="Score of the better answer minus the worse one's. Growth without accuracy is overconfidence.",
        axis=_amount("log-odds", floor=None),
        curves=(Curve("margin", "margin", "teal"),),
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
            Curve("rewards/chosen", "better", "green"),
            Curve("rewards/rejected", "worse", "red"),
            Curve("rewards/margins", "margin"),
            Curve("eval_rewards/margins", "margin, held out", "orange"),
        ),
    ),
    Chart(
        title="Pairs in the right order",
        caption="By implicit reward; a tie counts as wrong, so the first step says little.",
        axis=_share("share of pairs", ceiling=1.0),
        curves=(
            Curve("rewards/accuracies", "training", "green"),
            Curve("eval_rewards/accuracies", "held out", "orange"),
        ),
    ),
    Chart(
        title="Log-probability of answers",
        caption="Both often fall. Where the better answers fall far, too, the policy forgets how to write them.",
        axis=_amount("nats", floor=None),
        curves=(Curve("logps/chosen", "better", "green"), Curve("logps/rejected", "worse", "red")),
    ),
)
"""Of learning from comparisons."""

TRAINING = (
    Chart(
        title="Reward",
        caption="Mean over the step's scored answers, with the parts that it is made of.",
        axis=_amount("reward", floor=None),
        curves=(Curve("reward", "reward"), Curve("rewards/*")),
    ),
    Chart(
        title="Parts of rewards",
        caption="What rewards say beside their value: single objectives, the spread of an ensemble.",
        axis=_amount("value", floor=None),
        curves=(Curve("rewards/*/*"),),
    ),
    Chart(
        title="Gate",
        caption="What each objective counts for by the prompt, mean over answers.",
        axis=_share("weight", ceiling=1.0),
        curves=(Curve("rewards/*/gate/*"),),
    ),
    Chart(
        title="Solved",
        caption="Sampled answers that are right, on training tasks.",
        axis=_share("share of answers", ceiling=1.0),
        curves=(Curve("solved", "solved", "green"),),
    ),
    Chart(
        title="Groups without signal",
        caption="All answers right: too easy. All wrong: too hard. Neither moves the policy.",
        axis=_share("share of groups", ceiling=1.0),
        curves=(
            Curve("frac_groups_all_right", "all right", "green"),
            Curve("frac_groups_all_wrong", "all wrong", "red"),
        ),
        stacked=True,
    ),
    Chart(
        section="Policy",
        title="Entropy",
        caption="How undecided the policy is. Near zero it has stopped exploring.",
        axis=_amount("nats per token"),
        curves=(Curve("entropy", "entropy", "violet"),),
    ),
    Chart(
        section="Policy",
        title="KL to the start",
        caption="Distance from the policy that the stage began with.",
        axis=_amount("nats per token"),
        curves=(Curve("kl", "KL", "violet"),),
    ),
    Chart(
        section="Policy",
        title="Clipped tokens",
        caption="Tokens whose probability ratio left the trust region, below and above.",
        axis=_share("share of tokens"),
        curves=(Curve("clip_ratio/low_mean", "low", "teal"), Curve("clip_ratio/high_mean", "high", "orange")),
    ),
    Chart(
        section="Policy",
        title="Sampler\N{EN DASH}trainer gap",
        caption="|log p| difference at equal weights. Numerical noise only; growth is a bug.",
        axis=_amount("nats per token, log scale", log=True),
        curves=(Curve("sampling/logp_gap_mean", "mean", "blue"),),
    ),
    Chart(
        section="Policy",
        title="Gradient norm",
        caption="Before clipping.",
        axis=_amount("norm"),
        curves=(Curve("grad_norm", "norm", "teal"),),
    ),
    Chart(
        section="Policy",
        title="Learning rate",
        caption="What the optimizer was given.",
        axis=_amount("learning rate"),
        curves=(Curve("lr", "rate", "grey"),),
    ),
    Chart(
        section="Answers",
        title="Answer length",
        caption="Mean, and the range from the shortest to the longest.",
        axis=_amount("tokens"),
        curves=(Curve("completions/mean_length", "mean"), Curve("reflection/mean_length", "with reflection", "violet")),
        band=("completions/min_length", "completions/max_length"),
    ),
    Chart(
        section="Answers",
        title="Truncated",
        caption="Answers that the token budget cut off.",
        axis=_share("share of answers"),
        curves=(Curve("completions/clipped_ratio", "truncated", "red"),),
    ),
    Chart(
        section="Answers",
        title="Reflection",
        caption="Answers with words such as \N{LEFT DOUBLE QUOTATION MARK}wait\N{RIGHT DOUBLE QUOTATION MARK} or "
        "\N{LEFT DOUBLE QUOTATION MARK}check\N{RIGHT DOUBLE QUOTATION MARK}.",
        axis=_share("share of answers"),
        curves=(Curve("reflection/share", "with reflection", "violet"),),
    ),
    Chart(
        section="Answers",
        title="Outcomes other than finished",
        caption="Failures are counted here and never become a reward of zero.",
        axis=_amount("episodes per step"),
        curves=(Curve("outcomes/*"),),
        stacked=True,
    ),
    Chart(
        section="Machine",
        title="Time per step",
        caption="By phase.",
        axis=Axis(label="seconds", show=seconds, floor=0.0),
        curves=(Curve("time/*"),),
        stacked=True,
    ),
    Chart(
        section="Machine",
        title="Throughput",
        caption="Tokens per second of the whole loop.",
        axis=_amount("tokens per second"),
        curves=(Curve("tokens_per_second", "tokens per second", "teal"),),
    ),
)
"""Of every stage that trains; a chart without data is left out."""
