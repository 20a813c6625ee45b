"""From scored groups to rows with every column that the objective reads: log-probabilities, advantages, token filters.

All statistics are taken here, over the whole step, before anything is split: what the objective gets is data. A
token that an estimator leaves out (80/20, Clip-Cov) has advantage 0 and still counts in the denominators; an answer
that a data filter leaves out (overlong) is gone from both.

Legend: T all trained tokens of the step, answer after answer; N answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import isnan, nan
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from whet.algorithms.critic import Critic, Trajectory
from whet.algorithms.groups import Answer, only
from whet.algorithms.turns import Gain, first_time, from_tree, from_turns
from whet.config import PolicyConfig
from whet.config.policy_terms import CovarianceFilter, HighEntropyFilter, TokenFilter
from whet.formulas.policy import covariance, k1
from whet.formulas.step import (
    BASELINES,
    CREDITS,
    SCALES,
    RunningScale,
    StepAnswers,
    normalised_sum,
    steps_to_go,
)
from whet.records import Column, Group, Outcome
from whet.training.base import REFERENCE, TEACHER, Trainer


def with_lags(answers: Sequence[Answer], version: int) -> list[Answer]:
    """Add `lag`: by how many hand-overs the weights that wrote a token are older than `version`."""
    turns = [turn.completion.versions for answer in answers for turn in answer.episode.turns]
    return _put_flat(answers, "lag", torch.from_numpy(version - np.concatenate([*turns, np.zeros(0, np.int32)])))


def with_logps(
    answers: Sequence[Answer], trainer: Trainer, config: PolicyConfig, *, temperature: float, lagging: bool = False
) -> list[Answer]:
    """Add `ref_logp` where a KL is asked for, `teacher_logp`, and `old_logp`.

    The last where several updates follow one rollout, or where rollouts are `lagging` and it differs from what sampled.
    """
    rows = [row for answer in answers for row in answer.rows]
    if config.kl.place != "none":
        answers = _put(
            answers, "ref_logp", trainer.forward(rows, "logp", temperature=temperature, frozen=REFERENCE)["logp"]
        )
    if config.credit == "teacher":
        said = trainer.forward(rows, "logp", temperature=temperature, frozen=TEACHER)["logp"]
        answers = _put(answers, "teacher_logp", said)
    if lagging or (config.minibatches > 1 and config.ratio.denominator == "old"):
        answers = _put(answers, "old_logp", trainer.forward(rows, "logp", temperature=temperature)["logp"])
    return list(answers)


def with_gains(answers: Sequence[Answer], trainer: Trainer, gain: Gain) -> tuple[list[Answer], dict[str, float]]:
    """Add what each turn gained in information, and say how likely the right answer was at first and at last."""
    chances = gain.of([answer.episode for answer in answers], trainer)
    ends = [(known[0], known[-1]) for known in chances if known and not isnan(known[0] + known[-1])]
    first, last = zip(*ends, strict=True) if ends else ((nan,), (nan,))
    metrics = {"gain/first": fmean(first), "gain/last": fmean(last)}
    gained = [replace(a, gains=gain.rewards(known)) for a, known in zip(answers, chances, strict=True)]
    return gained, metrics


def trained_once(answers: Sequence[Answer]) -> list[Answer]:
    """The answers in which turns that several share are trained in the first of them; after all statistics."""
    found = []
    for answer, first in zip(answers, first_time(answers), strict=True):
        pieces = np.split(first, np.cumsum([row.trained_count for row in answer.rows])[:-1])
        found.append(replace(answer, rows=tuple(map(only, answer.rows, pieces))))
    return found


def with_rewards(
    answers: Sequence[Answer], config: PolicyConfig, *, kl_coefficient: float, spread: RunningScale
) -> list[Answer]:
    """Add `reward`, token by token: minus the KL where it is paid there, grades of steps, the answer's at its end.

    What the answer got for single turns stands at their last tokens, where credit looks at that.
    """
    length_N = [answer.length for answer in answers]
    token_reward_T = torch.zeros(sum(length_N), dtype=torch.float64)
    if config.kl.place == "reward" and answers:
        token_reward_T -= kl_coefficient * k1(_old_logp(answers), _get(answers, "ref_logp"))
    scaled = config.critic is not None and config.critic.scale_rewards
    for piece, answer in zip(torch.split(token_reward_T, length_N), answers, strict=True):
        # The pieces are views; an answer without tokens has none to give its reward to.
        turns = answer.turn_rewards if config.credit != "outcome" else ()
        rest = answer.reward - (sum(answer.episode.score.turns) if turns else 0.0)
        piece[-1:] += spread.scaled(rest) if scaled else rest
        for end, value in zip(accumulate(answer.turn_lengths), turns if answer.length else (), strict=False):
            piece[end - 1] += spread.scaled(value) if scaled else value
        for last, value in answer.steps if config.step_weight else ():
            piece[last] += config.step_weight * (spread.scaled(value) if scaled else value)
    return _put_flat(answers, "reward", token_reward_T)


def with_values(answers: Sequence[Answer], critic: Critic) -> tuple[list[Answer], Mapping[str, float]]:
    """Add `value`, `return` and the critic's raw `advantage`, and say what was measured on the way."""
    provided = critic.provide(
        [Trajectory(rows=a.rows, truncated=a.episode.outcome is Outcome.TRUNCATED) for a in answers]
    )
    found = [replace(a, rows=t.rows) for a, t in zip(answers, provided.trajectories, strict=True)]
    return found, provided.metrics


def with_advantages(answers: Sequence[Answer], config: PolicyConfig, *, weights: Mapping[str, float]) -> list[Answer]:
    """Add `advantage`: credit minus baseline, scaled, over all scored answers of the step; a critic's is there.

    `weights` are those of the rewards by name, for objectives that are normalised one by one.
    """
    if not answers:
        return []
    if config.credit == "process":
        return _put_flat(answers, "advantage", _from_steps(answers, config))
    if config.credit in ("turns", "tree"):
        credit = from_turns if config.credit == "turns" else from_tree
        return _put_flat(answers, "advantage", credit(answers, _get(answers, "reward"), config))
    length_N = torch.tensor([answer.length for answer in answers])
    pieces = torch.split(_get(answers, "reward"), length_N.tolist())
    ends_N = torch.tensor([answer.reward if not answer.length else 0.0 for answer in answers], dtype=torch.float64)
    reward_N = torch.stack([piece.sum() for piece in pieces]) + ends_N
    group_N = _numbered([answer.group for answer in answers])
    if config.objectives == "normalised":
        reward_N = normalised_sum(_objectives(answers, weights), torch.tensor(list(weights.values())), group_N)
    known = StepAnswers(
        reward_N=reward_N,
        group_N=group_N,
        length_N=length_N,
        greedy_N=torch.tensor([answer.greedy for answer in answers], dtype=torch.float64),
    )
    if config.credit == "gae":
        advantage_T = _get(answers, "advantage")
    elif config.credit == "teacher":
        advantage_T = -k1(_old_logp(answers), _get(answers, "teacher_logp"))
    elif config.objectives == "normalised":
        advantage_T = known.per_token(reward_N - BASELINES[config.baseline](known))
    else:
        return_T = torch.cat([CREDITS[config.credit](piece) for piece in pieces])
        advantage_T = return_T - known.per_token(BASELINES[config.baseline](known))
    return _put_flat(answers, "advantage", SCALES[config.scale](advantage_T, known))


def _from_steps(answers: Sequence[Answer], config: PolicyConfig) -> Tensor:
    """Each token's advantage where steps are graded: baseline and scale are taken over the steps of all answers."""
    steps = [(place, last, value) for place, answer in enumerate(answers) for last, value in answer.steps]
    reward_S = torch.tensor([value for _, _, value in steps], dtype=torch.float64)
    known = StepAnswers(
        reward_N=reward_S,
        group_N=_numbered([answers[place].group for place, _, _ in steps]),
        length_N=torch.ones(len(steps), dtype=torch.long),
        greedy_N=torch.full_like(reward_S, nan),
    )
    advantage_S = SCALES[config.scale](reward_S - BASELINES[config.baseline](known), known)
    answer_S = torch.tensor([place for place, _, _ in steps], dtype=torch.long)
    last_S = torch.tensor([last for _, last, _ in steps], dtype=torch.long)
    pieces = [
        steps_to_go(advantage_S[answer_S == place], last_S[answer_S == place], answer.length)
        for place, answer in enumerate(answers)
    ]
    return torch.cat(pieces)


def with_filters(
    answers: Sequence[Answer], trainer: Trainer, config: PolicyConfig, *, temperature: float, seed: int
) -> list[Answer]:
    """Leave out what the filters leave out, and mark the tokens of KL-Cov and of the right answers.

    `positive` is 1 / (share of the step's tokens that are in right answers) there, so that weighed as a token mean its
    sum is the mean over those tokens.
    """
    if config.kl_cov is not None and answers:
        cov_T = covariance(_old_logp(answers), _get(answers, "advantage"))
        answers = _put_flat(answers, "kl_cov", _top(cov_T, config.kl_cov.share))
    if config.token_filter is not None and answers:
        keep_T = _keep(config.token_filter, answers, trainer, temperature=temperature, seed=seed)
        answers = _put_flat(answers, "advantage", _get(answers, "advantage") * keep_T)
    if config.overlong_filter:
        answers = [answer for answer in answers if answer.episode.outcome is not Outcome.TRUNCATED]
    if config.positive_nll is not None and answers:
        right_T = torch.cat([torch.full((a.length,), float(a.episode.score.correct is True)) for a in answers]).double()
        answers = _put_flat(answers, "positive", right_T / right_T.mean() if right_T.any() else right_T)
    return list(answers)


def with_mean_advantages(groups: Sequence[Group], answers: Sequence[Answer]) -> tuple[Group, ...]:
    """The step's groups, each episode with the mean advantage of its trained tokens, where it has one."""
    means = {
        id(answer.episode): float(np.concatenate([row.columns["advantage"] for row in answer.rows]).mean())
        for answer in answers
        if answer.length
    }
    return tuple(
        replace(group, episodes=tuple(replace(e, advantage=means.get(id(e))) for e in group.episodes))
        for group in groups
    )


def sequence_kl(answers: Sequence[Answer]) -> float:
    """KL(policy at rollout || reference) in nats for each answer: the mean over answers of the sum of k1."""
    return float(k1(_old_logp(answers), _get(answers, "ref_logp")).sum()) / len(answers)


def measure_lag(answers: Sequence[Answer]) -> dict[str, float]:
    """How old the step's tokens are, and how far the policy has moved from those that sampled them.

    With w = p(trainer now) / p(sampler then): the effective sample size is (sum w)^2 / (n sum w^2), and the KL of a lag
    is the mean of its tokens' w - 1 - log w.
    """
    lag_T, log_w_T = _get(answers, "lag"), _get(answers, "old_logp") - _get(answers, "sampler_logp")
    if not len(lag_T):
        return {}
    w_T = log_w_T.exp()
    found = {"lag/mean": float(lag_T.mean()), "lag/max": float(lag_T.max())}
    found["lag/ess"] = float(w_T.sum() ** 2 / (len(w_T) * (w_T**2).sum()))
    for lag in lag_T.unique().tolist():
        of = lag_T == lag
        found[f"lag/share/{int(lag)}"] = float(of.double().mean())
        found[f"lag/kl/{int(lag)}"] = float((w_T - 1 - log_w_T)[of].mean())
    return found


def _objectives(answers: Sequence[Answer], weights: Mapping[str, float]) -> Tensor:
    """What each named reward gave to each answer, (N, K); NaN where it did not apply."""
    parts_NK = [[answer.episode.score.parts[name] for name in weights] for answer in answers]
    return torch.tensor([[nan if v is None else v for v in parts_K] for parts_K in parts_NK], dtype=torch.float64)


def _numbered(groups: Sequence[int]) -> Tensor:
    """The groups numbered anew from 0 in their order: one of which nothing was scored has no number."""
    return torch.unique(torch.tensor(groups, dtype=torch.long), return_inverse=True)[1]


def _keep(
    filtering: TokenFilter, answers: Sequence[Answer], trainer: Trainer, *, temperature: float, seed: int
) -> Tensor:
    """1 for the tokens whose gradient stays, else 0."""
    match filtering:
        case HighEntropyFilter():
            rows = [row for answer in answers for row in answer.rows]
            entropies = trainer.forward(rows, "entropy", temperature=temperature)["entropy"]
            return _top(torch.from_numpy(np.concatenate([*entropies, ()], dtype=np.float64)), filtering.share)
        case CovarianceFilter():
            cov_T = covariance(_old_logp(answers), _get(answers, "advantage"))
            between = ((cov_T > filtering.low) & (cov_T < filtering.high)).nonzero().squeeze(-1)
            order = torch.randperm(len(between), generator=torch.Generator().manual_seed(seed))
            keep_T = torch.ones_like(cov_T)
            keep_T[between[order[: max(1, int(filtering.share * len(cov_T)))]]] = 0
            return keep_T


def _top(value_T: Tensor, share: float) -> Tensor:
    """1 for the `share` of tokens with the largest values (at least one), else 0; ties go to the earlier token."""
    chosen = value_T.argsort(descending=True, stable=True)[: max(1, round(share * len(value_T)))]
    return torch.zeros_like(value_T).index_fill(0, chosen, 1.0)


def _old_logp(answers: Sequence[Answer]) -> Tensor:
    """log p at rollout: the trainer's where it was computed, else the sampler's (they are compared in every step)."""
    computed = "old_logp" in answers[0].rows[0].columns
    return _get(answers, "old_logp" if computed else "sampler_logp")


def _get(answers: Sequence[Answer], name: str) -> Tensor:
    """A column of all rows, (T,)."""
    columns = [row.columns[name] for answer in answers for row in answer.rows]
    return torch.from_numpy(np.concatenate([*columns, ()], dtype=np.float64))


def _put(answers: Sequence[Answer], name: str, columns: Iterable[Column]) -> list[Answer]:
    """The answers with one column more: one array for each row."""
    given = iter(columns)
    return [
        replace(answer, rows=tuple(row.with_columns(**{name: next(given)}) for row in answer.rows))
        for answer in answers
    ]


def _put_flat(answers: Sequence[Answer], name: str, value_T: Tensor) -> list[Answer]:
    counts = [row.trained_count for answer in answers for row in answer.rows]
    return _put(answers, name, (piece.numpy() for piece in torch.split(value_T, counts)))
