"""A step's groups: the rows that they are trained on, what is left out of them, and what they look like in numbers.

Tokens are exactly as sampled, trained where the policy wrote them. One NaN in a step would be in the mean of its group,
then in the whitening of the step, then in the weights. So an answer with a number that is not finite is left out before
anything is computed from it, and traced to its rollout. Names of metrics follow TRL's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from math import isfinite, nan
from statistics import fmean, stdev
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from whet.models.marks import RoleTable
from whet.records import Atom, Episode, Group, Outcome, Score, TokenRow, Turn
from whet.rollouts.feed import Taken
from whet.training.base import Objective, OptimResult, Trainer

T = TypeVar("T")
NAMED = 3
"""Most rollouts that one line names."""
REFLECTION = re.compile(
    r"\b(wait|hmm|let me (?:check|verify|re-?think)|(?:double|re)-?check|verify|re-?evaluate|however|mistake|"
    r"actually|alternatively|on second thought)\b",
    re.IGNORECASE,
)
"""Words by which a model takes a second look (the kind counted in the R1-Zero literature)."""
BARREN = 20
"""Steps in a row from which nothing could be learned, after which a run gives up."""
LONGEST = 200
"""Characters of a reason that the console shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A scored episode as the rows that it is trained on."""

    episode: Episode
    group: int
    """Place of its group in the step."""
    rows: tuple[TokenRow, ...]
    reward: float
    """Its score, less what a constraint charges for it."""
    greedy: float = nan
    """The reward of the greedy answer to the same prompt, where one was played."""
    gains: tuple[float, ...] = ()
    """What each turn gained in information, weighed; rewards of turns beside those of the score."""

    @property
    def turn_rewards(self) -> list[float]:
        """What each turn was rewarded with by itself."""
        given = zip_longest(self.episode.score.turns, self.gains, fillvalue=0.0)
        return [*map(sum, given), *[0.0] * len(self.episode.turns)][: len(self.episode.turns)]

    @property
    def length(self) -> int:
        """Trained tokens of all its rows."""
        return sum(row.trained_count for row in self.rows)

    @property
    def turn_lengths(self) -> list[int]:
        """Trained tokens of each of its turns, over all rows."""
        return [len(turn.completion.tokens) for turn in self.episode.turns]

    @property
    def steps(self) -> list[tuple[int, float]]:
        """(place of its last token among all trained tokens of the answer, grade) of each graded step."""
        if not self.episode.steps:
            return []
        before = self.length - len(self.episode.turns[-1].completion.tokens)
        return [(before + step.last, step.value) for step in self.episode.steps]


def to_answers(groups: Sequence[Group], reward: Callable[[Score], float]) -> list[Answer]:
    """The scored episodes of a step; where ReMax's greedy answer was not scored, its group is left out.

    `reward` says what a score is worth.
    """
    answers = []
    for place, group in enumerate(groups):
        if group.greedy is not None and group.greedy.score.value is None:
            continue
        greedy = nan if group.greedy is None else reward(group.greedy.score)
        answers += [
            Answer(episode=e, group=place, rows=tuple(to_rows(e)), reward=reward(e.score), greedy=greedy)
            for e in group.scored
        ]
    return answers


def to_rows(episode: Episode) -> list[TokenRow]:
    """The episode as rows with the column `sampler_logp`.

    Turns whose prompt continues the tokens before it join one row, in which observations are context. Where a
    template rewrites history, a new row begins.
    """
    rows: list[TokenRow] = []
    turns: list[Turn] = []

    def close() -> None:
        if turns:
            rows.append(_row(turns, shared=len(episode.turns[0].prompt) if not rows else 0))
            turns.clear()

    for turn in episode.turns:
        if turns and not _continues(turns[-1], turn):
            close()
        turns.append(turn)
    close()
    return rows


def to_atoms(rows: Sequence[TokenRow]) -> list[Atom]:
    """Rows that begin with the same shared prompt become one atom, whose prompt is computed once."""
    groups: dict[bytes, list[TokenRow]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    alone = [Atom(rows=(row,)) for row in groups.pop(b"", [])]
    return [Atom(rows=tuple(group)) for group in groups.values()] + alone


def minibatches(things: Sequence[T], parts: int) -> list[Sequence[T]]:
    """So many parts of nearly equal size; none is empty."""
    bounds = [len(things) * i // parts for i in range(parts + 1)]
    return [things[low:high] for low, high in pairwise(bounds) if high > low]


def with_roles(row: TokenRow, table: RoleTable) -> TokenRow:
    """The row with the column `role`: where each trained token stands, by what precedes it."""
    return row.with_columns(role=table.roles(row.tokens)[np.flatnonzero(row.trained) - 1])


def only_roles(row: TokenRow, roles: Collection[int]) -> TokenRow:
    """The row with the tokens of these roles trained alone."""
    return only(row, np.isin(row.columns["role"], list(roles)))


def only(row: TokenRow, kept_T: npt.NDArray[np.bool_]) -> TokenRow:
    """The row with these of its trained tokens trained: the others are context, and in no denominator."""
    trained = row.trained.copy()
    trained[np.flatnonzero(row.trained)[~kept_T]] = False
    return replace(row, trained=trained, columns={name: column[kept_T] for name, column in row.columns.items()})


def _continues(before: Turn, turn: Turn) -> bool:
    """Whether the prompt begins with all tokens of the turn before it."""
    start, written = len(before.prompt), before.completion.tokens
    end = start + len(written)
    return np.array_equal(turn.prompt[:start], before.prompt) and np.array_equal(turn.prompt[start:end], written)


def _row(turns: Sequence[Turn], *, shared: int) -> TokenRow:
    """Turns that continue one another: the last one has all tokens of those before it."""
    last = turns[-1]
    tokens = np.concatenate([last.prompt, last.completion.tokens])
    trained = np.zeros(len(tokens), np.bool_)
    for turn in turns:
        trained[len(turn.prompt) : len(turn.prompt) + len(turn.completion.tokens)] = True
    logps = np.concatenate([turn.completion.logprobs for turn in turns])
    return TokenRow(tokens=tokens, trained=trained, columns={"sampler_logp": logps}, shared=shared)


# ------------------------------------------------------------------------------- what is left out


def drop_nonfinite(answers: Sequence[Answer]) -> tuple[list[Answer], list[str]]:
    """The answers whose columns are all finite, and of each of the others `NAME (column is nan)`."""
    faults = [_fault(answer) for answer in answers]
    kept = [answer for answer, fault in zip(answers, faults, strict=True) if fault is None]
    return kept, [f"{name_of(a)} ({fault})" for a, fault in zip(answers, faults, strict=True) if fault is not None]


def find_nonfinite(
    trainer: Trainer, answers: Sequence[tuple[Answer, Sequence[Atom]]], objective: Objective
) -> list[str]:
    """The answers, each given with its own atoms, whose loss is not finite by itself."""
    return [
        name_of(answer)
        for answer, atoms in answers
        if atoms and not isfinite(trainer.evaluate(atoms, objective)["loss"].total)
    ]


def name_of(answer: Answer) -> str:
    """An answer as it is found in the step's rollout file."""
    return f"task {answer.episode.task} sample {answer.episode.sample}"


def listed(names: Sequence[str], step: int) -> str:
    """`task a sample 3, task b sample 0 and 5 more (rollouts/step-000012.parquet)`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} (rollouts/step-{step:06d}.parquet)"


def skipped_update(result: OptimResult) -> str:
    """What became of an update, and where its gradient was first not finite."""
    return f"an update was skipped, the gradient of {result.not_finite} was not finite"


def _fault(answer: Answer) -> str | None:
    for row in answer.rows:
        for name, values in row.columns.items():
            wrong = values[~np.isfinite(values)]
            if len(wrong):
                return f"{name} is {wrong[0]}"
    return None


# ---------------------------------------------------------------------------------------- metrics


def measure_groups(groups: Sequence[Group]) -> dict[str, float]:
    """The step's metrics over every episode that was played, left-out groups included.

    `reward` and `solved` are means over scored episodes; the shares of groups are over groups with a scored episode.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    scored = [episode for episode in episodes if episode.score.value is not None]
    lengths = [episode.sampled_tokens for episode in episodes]
    spread = [stdev(values) for group in groups if len(values := _values(group)) > 1]
    metrics = {
        "reward": _mean(episode.score.value for episode in scored),
        "reward_std": _mean(spread),
        "solved": _mean(float(e.score.correct) for e in scored if e.score.correct is not None),
        "frac_groups_all_right": _share(groups, lambda judged: judged == {True}),
        "frac_groups_all_wrong": _share(groups, lambda judged: judged == {False}),
        "frac_reward_zero_std": _mean(float(value == 0) for value in spread),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean(float(e.outcome is Outcome.TRUNCATED) for e in episodes),
        "sampled_tokens": float(sum(lengths) + sum(g.greedy.sampled_tokens for g in groups if g.greedy is not None)),
        "unscored": float(len(episodes) - len(scored)),
        **_reflection(episodes),
        **_turns(episodes),
        **_parts(scored),
    }
    ended = Counter(episode.outcome for episode in episodes)
    ended[Outcome.GRADER_GAVE_UP] = sum(episode.score.outcome is Outcome.GRADER_GAVE_UP for episode in episodes)
    for outcome in Outcome:
        if count := ended[outcome]:
            metrics[f"outcomes/{outcome}"] = float(count)
    return metrics


def unscored(groups: Sequence[Group]) -> list[str]:
    """`3 of 16 answers were not scored: 2 grader_timeout (...), 1 engine_error (...)`, each with its first reason."""
    episodes = [episode for group in groups for episode in group.episodes]
    lost = [episode for episode in episodes if episode.score.value is None]
    first = {episode.outcome: episode.score.note[:LONGEST] for episode in reversed(lost)}
    counted = Counter(episode.outcome for episode in lost)
    reasons = ", ".join(f"{count} {outcome} ({first[outcome]})" for outcome, count in counted.most_common())
    return [f"{len(lost)} of {len(episodes)} answers were not scored: {reasons}"] if lost else []


def why_no_signal(groups: Sequence[Group], *, overlong_filter: bool = False) -> str:
    """Why nothing could be learned from these groups, and the remedy."""
    measured = measure_groups(groups)
    scored = [episode for group in groups for episode in group.scored]
    cut = sum(episode.outcome is Outcome.TRUNCATED for episode in scored)
    if not scored:
        return "no answer was scored"
    if overlong_filter and cut and any(len(set(_values(group))) > 1 for group in groups):
        return (
            f"overlong_filter left out {cut} of {len(scored)} answers, which were cut off; raise sampling.max_tokens "
            "or set overlong_filter: false"
        )
    wrong, right = measured["frac_groups_all_wrong"], measured["frac_groups_all_right"]
    if wrong + right > 0:
        what = f"of the groups {wrong:.0%} were all wrong and {right:.0%} all right"
        return f"{what}; use easier or harder tasks, or more rollouts"
    if max(episode.sampled_tokens for episode in scored) == 0:
        return "all answers are empty"
    return "the answers to each prompt had equal rewards; use a finer reward, or more rollouts"


def measure_taken(taken: Taken, trained_s: float) -> dict[str, float]:
    """What came of asking for groups, and where the step's time went; `trained_s` is the time that training took."""
    sampled = sum(episode.sampled_tokens for group in taken.played for episode in group.episodes)
    return {
        "groups/trained": float(len(taken.groups)),
        "groups/left_out": float(len(taken.left_out)),
        "groups/rounds": float(taken.rounds),
        "groups/again": float(taken.again),
        "groups/resting": float(taken.resting),
        "tokens_per_second": sampled / (taken.rollout_s + taken.score_s + trained_s),
        "time/rollout": taken.rollout_s,
        "time/score": taken.score_s,
        "time/train": trained_s,
    }


def _values(group: Group) -> list[float]:
    return [episode.score.value for episode in group.scored if episode.score.value is not None]


def _parts(episodes: Sequence[Episode]) -> dict[str, float]:
    names = sorted({name for episode in episodes for name in episode.score.parts})
    return {f"rewards/{name}": _mean(e.score.parts.get(name) for e in episodes) for name in names}


def _reflection(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of answers that take a second look, and how long those are."""
    looks = [any(m.role == "assistant" and REFLECTION.search(m.content) for m in e.messages) for e in episodes]
    return {
        "reflection/share": _mean(map(float, looks)),
        "reflection/mean_length": _mean(e.sampled_tokens for e, look in zip(episodes, looks, strict=True) if look),
    }


def _turns(episodes: Sequence[Episode]) -> dict[str, float]:
    """How many turns an episode had, and calls: in all, and by what became of them; nothing where all had one turn."""
    calls = [call.status for e in episodes for message in e.messages for call in message.tool_calls]
    if not calls and all(len(episode.turns) < 2 for episode in episodes):
        return {}
    counted = {f"calls/{status}": count / len(episodes) for status, count in Counter(calls).items()}
    turns = sum(len(episode.turns) for episode in episodes)
    return {"turns/mean": turns / len(episodes), "calls/mean": len(calls) / len(episodes), **counted}


def _share(groups: Sequence[Group], holds: Callable[[set[bool | None]], bool]) -> float:
    judged = [{episode.score.correct for episode in group.scored} for group in groups if group.scored]
    return _mean(float(holds(values)) for values in judged)


def _mean(values: Iterable[float | None]) -> float:
    """The mean of what is there; NaN where nothing is."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else float("nan")
