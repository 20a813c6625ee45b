"""Evaluations: statistics of sampled answers, and the rows of the comparison table."""

from whet.evals.run import EvalRow, SampledAnswer, compare, summarise, table
from whet.evals.stats import Interval, avg_at_n, maj_at_k, mean_interval, paired_interval, pass_at_k, sign_flip_p

__all__ = [
    "EvalRow",
    "Interval",
    "SampledAnswer",
    "avg_at_n",
    "compare",
    "maj_at_k",
    "mean_interval",
    "paired_interval",
    "pass_at_k",
    "sign_flip_p",
    "summarise",
    "table",
]
