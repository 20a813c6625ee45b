"""What is taken over a whole optimizer step, before anything is split: advantages, and the weight of each token.

Advantages: how much better an answer, or what follows a token, was than expected. Four choices: how several
*objectives* become one reward, the *credit* of a token (which rewards count for it), the *baseline* that is taken off,
and the *scale*. What carries no signal (equal rewards, a group of one) gets exactly 0, whatever rounding would make of
it.

A *reduction* is data: the weight that each trained token of an answer has in the step's loss, so that no split into
rows, micro-batches or ranks can change the loss.

Legend: N answers of the step, T all their tokens, answer after answer; K objectives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import TYPE_CHECKING

from whet.formulas.constants import torch

if TYPE_CHECKING:
    from torch import Tensor


EPS = 1e-6
"""Added to standard deviations (the papers state none; verl uses this)."""
SPREAD = "reward_spread/"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAnswers:
    """The scored answers of a training step. Where steps or turns are credited they are its N."""

    reward_N: Tensor
    """Everything that an answer was rewarded with, a KL in the reward included."""
    group_N: Tensor
    """Which prompt each answer belongs to, from 0; every number up to the largest is in use."""
    length_N: Tensor
    """Its sampled tokens."""
    greedy_N: Tensor
    """The reward of the greedy answer to the same prompt; NaN where none was played."""

    def per_token(self, value_N: Tensor) -> Tensor:
        """Each answer's number at each of its tokens, (T,)."""
        return value_N.repeat_interleave(self.length_N)

    def group_sum(self, value_N: Tensor) -> Tensor:
        """The sum over an answer's group, at each answer, (N,)."""
        return value_N.new_zeros(len(value_N)).index_add(0, self.group_N, value_N)[self.group_N]

    @property
    def size_N(self) -> Tensor:
        """How many answers an answer's group has."""
        return self.group_sum(torch.ones_like(self.reward_N))

    @property
    def differ_N(self) -> Tensor:
        """Whether the rewards of an answer's group differ."""
        low_N, high_N = (
            torch.zeros_like(self.reward_N).scatter_reduce(0, self.group_N, self.reward_N, how, include_self=False)
            for how in ("amin", "amax")
        )
        return (low_N != high_N)[self.group_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningScale:
    """The spread of all scores so far (Chan's merge), to divide scores by. A value: `merge` returns the next one.

    Scores are divided and never centred, because their sign may mean something.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances to the mean."""

    def merge(self, scores: Sequence[float]) -> RunningScale:
        """With these scores seen as well."""
        if not scores:
            return self
        count, mean = len(scores), sum(scores) / len(scores)
        total, distance = self.count + count, mean - self.mean
        return RunningScale(
            count=total,
            mean=self.mean + distance * count / total,
            squares=self.squares
            + sum((score - mean) * (score - mean) for score in scores)
            + distance * distance * self.count * count / total,
        )

    def scaled(self, score: float) -> float:
        """The score over the (population) standard deviation; as it is while nothing varied."""
        std = sqrt(self.squares / self.count) if self.count else 0.0
        return score / std if std > 0 else score

    @classmethod
    def start(cls, saved: Mapping[str, float]) -> RunningScale:
        """At the beginning of a run, or from what an earlier step had saved."""
        return cls(**{name: saved[SPREAD + name] for name in ("count", "mean", "squares")}) if saved else cls()

    @property
    def saved(self) -> dict[str, float]:
        """The numbers under names of its own among those of a step."""
        return {SPREAD + "count": self.count, SPREAD + "mean": self.mean, SPREAD + "squares": self.squares}


# -------------------------------------------------------------------------------------------- objectives


def normalised_sum(value_NK: Tensor, weight_K: Tensor, group_N: Tensor) -> Tensor:
    """sum_k weight_k (r_k - mean r_k) / std r_k, mean and std (Bessel) over the group, (N,) (GDPO 2601.05242).

    A value is NaN where a reward does not apply: it is in no statistic and adds nothing.
    """
    total_N = torch.zeros_like(value_NK[:, 0])
    for value_N, weight in zip(value_NK.unbind(1), weight_K, strict=True):
        applies_N = ~value_N.isnan()
        reward_N = value_N[applies_N]
        there = StepAnswers(
            reward_N=reward_N,
            group_N=torch.unique(group_N[applies_N], return_inverse=True)[1],
            length_N=torch.ones_like(reward_N, dtype=torch.long),
            greedy_N=torch.full_like(reward_N, nan),
        )
        total_N[applies_N] += weight * group_std(reward_N - group_mean(there), there)
    return total_N


# ------------------------------------------------------------------------------------------------ credit


def outcome(token_reward_T: Tensor) -> Tensor:
    """The sum of all rewards of the answer, at each of its tokens (T: the tokens of one answer)."""
    return token_reward_T.sum().expand_as(token_reward_T)


def return_to_go(token_reward_T: Tensor) -> Tensor:
    """The sum of the rewards from each token on, undiscounted (REINFORCE++ 2501.03262 eq. 8)."""
    return token_reward_T.flip(0).cumsum(0).flip(0)


def steps_to_go(advantage_S: Tensor, last_S: Tensor, length: int) -> Tensor:
    """The sum over the steps that end with a token or later, (length,) (GRPO 2402.03300, section 4.1.3).

    S are the graded steps of one answer, `last_S` the tokens that complete them.
    """
    return return_to_go(advantage_S.new_zeros(length).index_add(0, last_S, advantage_S))


def turns_to_go(reward_K: Tensor, *, gamma: float) -> Tensor:
    """G_t = sum_k>=t gamma^(k-t) r_k over the turns of one answer, (K,) (turn-level return to go; GiGPO 2505.10978)."""
    return_K = reward_K.clone()
    for turn in range(len(return_K) - 2, -1, -1):
        return_K[turn] += gamma * return_K[turn + 1]
    return return_K


def progress(scores: Sequence[float | None], *, smear: float) -> list[float]:
    """What each turn changed of a score of the play so far, from 0; None: the score stays (K turns).

    Each change is shared with the turns before it, at weights smear^distance over their sum, so the sum of all is the
    last score whatever `smear` is; 0 gives a turn its own change.
    """
    reward_K, before = [0.0] * len(scores), 0.0
    for turn, score in enumerate(scores):
        change = 0.0 if score is None else score - before
        before += change
        weights = [smear**distance for distance in range(turn + 1)]
        for distance, weight in enumerate(weights):
            reward_K[turn - distance] += change * weight / sum(weights)
    return reward_K


# ---------------------------------------------------------------------------------------------- baseline


def no_baseline(answers: StepAnswers) -> Tensor:
    """0: the raw reward is the advantage (REINFORCE)."""
    return torch.zeros_like(answers.reward_N)


def group_mean(answers: StepAnswers) -> Tensor:
    """The group's mean (GRPO 2402.03300, section 4.1.2)."""
    return _or_own(answers, answers.group_sum(answers.reward_N) / answers.size_N)


def leave_one_out(answers: StepAnswers) -> Tensor:
    """The mean of the *other* answers of the group (RLOO 2402.14740 eq. 7)."""
    return _or_own(answers, (answers.group_sum(answers.reward_N) - answers.reward_N) / (answers.size_N - 1))


def length_weighted_mean(answers: StepAnswers) -> Tensor:
    """sum(length x reward) / sum(length) over the group (OPO 2505.23585 eq. 6)."""
    length_N = answers.length_N.to(answers.reward_N.dtype)
    return _or_own(answers, answers.group_sum(length_N * answers.reward_N) / answers.group_sum(length_N))


def batch_mean(answers: StepAnswers) -> Tensor:
    """The mean over all answers of the step."""
    reward_N = answers.reward_N
    return reward_N if _all_equal(reward_N) else reward_N.mean().expand_as(reward_N)


def greedy(answers: StepAnswers) -> Tensor:
    """The reward of the greedy answer to the same prompt (ReMax 2310.10505 eq. 6)."""
    return answers.greedy_N


# ------------------------------------------------------------------------------------------------- scale


def no_scale(advantage_T: Tensor, answers: StepAnswers) -> Tensor:
    """As it is (Dr. GRPO 2503.20783: dividing by the std favours very easy and very hard prompts)."""
    return advantage_T


def group_std(advantage_T: Tensor, answers: StepAnswers) -> Tensor:
    """Over the standard deviation (Bessel) of the group's rewards (GRPO 2402.03300)."""
    mean_N = answers.group_sum(answers.reward_N) / answers.size_N
    square_N = answers.group_sum((answers.reward_N - mean_N).square())
    std_N = torch.where(answers.differ_N, (square_N / (answers.size_N - 1)).sqrt(), 0.0)
    return _over(advantage_T, answers.per_token(std_N))


def batch_std(advantage_T: Tensor, answers: StepAnswers) -> Tensor:
    """Over the standard deviation (Bessel) of all rewards of the step (Lite PPO 2508.08221)."""
    reward_N = answers.reward_N
    return _over(advantage_T, torch.zeros_like(advantage_T) if _all_equal(reward_N) else reward_N.std(correction=1))


def token_std(advantage_T: Tensor, answers: StepAnswers) -> Tensor:
    """Whitened: minus the mean and over the std (Bessel) of all tokens (REINFORCE++ 2501.03262 eq. 10)."""
    if _all_equal(advantage_T):
        return torch.zeros_like(advantage_T)
    return _over(advantage_T - advantage_T.mean(), advantage_T.std(correction=1))


def informative_share(advantage_T: Tensor, answers: StepAnswers) -> Tensor:
    """Over the share of answers whose group has a signal, i.e. times B / (B - M) (GPG 2504.02546 eq. 7)."""
    share = answers.differ_N.to(advantage_T.dtype).mean()
    return advantage_T / share if share > 0 else advantage_T


CREDITS: dict[str, Callable[[Tensor], Tensor]] = {"outcome": outcome, "return_to_go": return_to_go}
BASELINES: dict[str, Callable[[StepAnswers], Tensor]] = {
    "none": no_baseline,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "length_weighted_mean": length_weighted_mean,
    "batch_mean": batch_mean,
    "greedy": greedy,
}
TURN_BASELINES: dict[str, Callable[[StepAnswers], Tensor]] = {
    "turn_mean": group_mean,
    "turn_leave_one_out": leave_one_out,
    "same_state": group_mean,
    "turn_index": group_mean,
}
"""Of turns: the group is then the turns of a prompt with the same place in their answers, or that began in the same
state."""
BESIDE_WHOLE = ("same_state", "turn_index")
"""Those whose advantage of a turn is added to that of its whole answer."""
SCALES: dict[str, Callable[[Tensor, StepAnswers], Tensor]] = {
    "none": no_scale,
    "group_std": group_std,
    "batch_std": batch_std,
    "token_std": token_std,
    "informative_share": informative_share,
}


# ------------------------------------------------------------------------------------- reductions
# `lengths_N` counts an answer's trained tokens, over all of its rows. Returned is one weight per answer, the same for
# each of its tokens. Answers without trained tokens weigh nothing.


def token_mean(lengths_N: Sequence[int]) -> list[float]:
    """1 / tokens of the step: every token counts the same (DAPO's released code)."""
    total = sum(lengths_N)
    return [1 / total if length else 0.0 for length in lengths_N]


def group_token_mean(lengths_N: Sequence[int], *, groups_N: Sequence[int]) -> list[float]:
    """1 / (groups x tokens of the answer's group): every prompt counts the same (DAPO 2503.14476 eq. 8 as printed)."""
    tokens: dict[int, int] = defaultdict(int)
    for length, group in zip(lengths_N, groups_N, strict=True):
        tokens[group] += length
    groups = sum(total > 0 for total in tokens.values())
    return [1 / (groups * tokens[group]) if length else 0.0 for length, group in zip(lengths_N, groups_N, strict=True)]


def sequence_mean(lengths_N: Sequence[int]) -> list[float]:
    """1 / (answers x own length): every answer counts the same, however long (GRPO 2402.03300 eq. 3)."""
    answers = sum(length > 0 for length in lengths_N)
    return [1 / (answers * length) if length else 0.0 for length in lengths_N]


def sequence_sum(lengths_N: Sequence[int]) -> list[float]:
    """1 / answers: log p of whole answers, averaged over answers (RLOO 2402.14740, ReMax 2310.10505)."""
    answers = sum(length > 0 for length in lengths_N)
    return [1 / answers if length else 0.0 for length in lengths_N]


def sequence_sum_over_constant(lengths_N: Sequence[int], *, constant: int) -> list[float]:
    """1 / (answers x constant): no length in the denominator (Dr. GRPO 2503.20783; the constant is max_tokens)."""
    answers = sum(length > 0 for length in lengths_N)
    return [1 / (answers * constant) if length else 0.0 for length in lengths_N]


def token_sum(lengths_N: Sequence[int]) -> list[float]:
    """1: the learning rate then means something else for every batch size."""
    return [1.0 if length else 0.0 for length in lengths_N]


REDUCTIONS: dict[str, Callable[[Sequence[int], Sequence[int], int], list[float]]] = {
    "token_mean": lambda lengths_N, groups_N, constant: token_mean(lengths_N),
    "group_token_mean": lambda lengths_N, groups_N, constant: group_token_mean(lengths_N, groups_N=groups_N),
    "sequence_mean": lambda lengths_N, groups_N, constant: sequence_mean(lengths_N),
    "sequence_sum": lambda lengths_N, groups_N, constant: sequence_sum(lengths_N),
    "sequence_sum_over_constant": lambda lengths_N, groups_N, constant: sequence_sum_over_constant(
        lengths_N, constant=constant
    ),
    "token_sum": lambda lengths_N, groups_N, constant: token_sum(lengths_N),
}
"""All as functions of (trained tokens of each answer, its group, the stage's `max_tokens`)."""


def _or_own(answers: StepAnswers, value_N: Tensor) -> Tensor:
    """The value, or the answer's own reward where all of its group are equal: its advantage is then exactly 0."""
    return torch.where(answers.differ_N, value_N, answers.reward_N)


def _over(value_T: Tensor, std: Tensor) -> Tensor:
    """value / (std + EPS), and exactly 0 where the std is."""
    return torch.where(std > 0, value_T / (std + EPS), 0.0)


def _all_equal(values: Tensor) -> bool:
    return values.numel() < 2 or bool((values == values[0]).all())
