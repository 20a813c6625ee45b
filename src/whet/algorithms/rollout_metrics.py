"""What a batch of groups looks like: rewards, signal, lengths, reflection, outcomes. Names follow TRL's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

from whet.records import Episode, Group, Outcome
from whet.rollouts.feed import Taken

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
