"""The comparison stage: sample answers, find out which are better, write pairs (RLAIF, 2309.00267).

Either a judge compares them in pairs, which gives soft labels, or rewards score them. What could not be judged, ties,
equal answers, such as were cut off (a row would say that they end there) and such as no later stage could read make no
row; each is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from whet.config import TrainConfig
from whet.config.rows import CompareStage
from whet.envs.base import Task
from whet.envs.judges.judge import Judge, Preference, build_judge, build_wording
from whet.envs.rewards.judge import matches
from whet.pipeline.generate import Chunk, Counts, Row, make_rows, writable
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import Ungraded, check_tasks, player, tasks_of
from whet.pipeline.stage import Context, Kind, Seen
from whet.records import Ending, Episode, Group, Message, Score, seed_of
from whet.rollouts.play import Player
from whet.templates.base import Template
from whet.tracking.charts import ROWS_LOOK


def run_compare(context: Context[CompareStage]) -> None:
    """Sample, judge and write until every task has its chance."""
    config, world = context.config, context.world
    with ExitStack() as opened:
        grading, judge = opened.enter_context(closing(rubric(config.tasks, config.rewards, world))), None
        if config.judge is not None:
            judge = opened.enter_context(closing(build_judge(config.judge, world.chat(config.judge.model))))
        tasks = tasks_of(context, grading, each=f" x {config.samples} answers")
        policy = world.policy(context.model, TrainConfig(), config.sampling)
        play = player(policy, grading if judge is None else Ungraded("compared in pairs"), config.sampling)
        make_rows(context, tasks, config.chunk, _Compare(context, play, judge).chunk, decode=policy.template.decode)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two answers of a group, and how likely it is that the first is better; None: not decided."""

    first: Episode
    second: Episode
    found: Preference


@dataclass(frozen=True, slots=True)
class _Compare:
    context: Context[CompareStage]
    player: Player
    judge: Judge | None

    def chunk(self, number: int, chosen: Sequence[Task]) -> Chunk:
        seed = seed_of(self.context.seed, "compare", number)
        played = self.player.play(chosen, self.context.config.samples, step=number, seed=seed)
        tally = Counts(float)
        candidates = [
            _different(group, task.messages, self.player.template, tally)
            for task, group in zip(chosen, played.groups, strict=True)
        ]
        began = time.perf_counter()
        pairs = self._by_judge(chosen, candidates) if self.judge is not None else _by_score(candidates)
        score_s = played.score_s + time.perf_counter() - began
        rows: list[Row] = []
        for task, found in zip(chosen, pairs, strict=True):
            rows += self._rows(task, found, tally)
        flat = [pair for found in pairs for pair in found]
        lost = [pair.found for pair in flat if pair.found.chance is None]
        groups = played.groups if self.judge is None else _with_win_rates(played.groups, flat)
        return Chunk(
            rows=rows,
            metrics={**_metrics(flat, rows, tally), "time/rollout": played.rollout_s, "time/score": score_s},
            groups=groups,
            failures=[each.failure for each in lost],
            unread=sum(each.unparsed for each in lost),
            candidates=len(flat),
        )

    def _by_judge(self, chosen: Sequence[Task], candidates: Sequence[Sequence[Episode]]) -> list[list[_Pair]]:
        """Every two different answers to a task, judged; all tasks of the chunk in one call."""
        assert self.judge is not None
        numbered = [
            (place, several[i], several[j])
            for place, several in enumerate(candidates)
            for i, j in matches(range(len(several)), None)
        ]
        found = self.judge.prefer(
            [chosen[place].messages for place, _, _ in numbered],
            [(_answer(first), _answer(second)) for _, first, second in numbered],
        )
        pairs: list[list[_Pair]] = [[] for _ in candidates]
        for (place, first, second), preference in zip(numbered, found, strict=True):
            pairs[place].append(_Pair(first, second, preference))
        return pairs

    def _rows(self, task: Task, found: Sequence[_Pair], tally: Counts) -> list[Row]:
        """The rows of one task, the clearest preference first; the same pairs always in the same order."""
        told = []
        for pair in found:
            if pair.found.chance is None:
                tally["pairs/unjudged"] += 1
            elif pair.found.chance == 0.5:
                tally["pairs/ties"] += 1
            else:
                told.append(pair)
        told.sort(key=lambda pair: -abs((pair.found.chance or 0.5) - 0.5))
        return [_row(task, pair) for pair in (_furthest(told) if self.context.config.pairs == "best_worst" else told)]


def _different(group: Group, asked: Sequence[Message], template: Template, tally: Counts) -> list[Episode]:
    """The answers of a group that can stand in a row, each text once."""
    firsts: dict[str, Episode] = {}
    for episode in group.episodes:
        if not episode.turns:  # the request failed: its last message is the task's
            tally["answers/failed"] += 1
        elif any(turn.completion.ending is Ending.LENGTH for turn in episode.turns):
            tally["answers/cut_off"] += 1
        elif not writable(template, asked, _answer(episode)):
            tally["answers/unusable"] += 1
        elif _answer(episode) in firsts:
            tally["answers/same"] += 1
        else:
            firsts[_answer(episode)] = episode
    return list(firsts.values())


def _by_score(candidates: Sequence[Sequence[Episode]]) -> list[list[_Pair]]:
    """Every two answers to a task by their scores: the higher one is better, for certain."""
    return [
        [_Pair(several[i], several[j], _scored(several[i], several[j])) for i, j in matches(range(len(several)), None)]
        for several in candidates
    ]


def _scored(first: Episode, second: Episode) -> Preference:
    for episode in (first, second):
        if episode.score.value is None:
            return Preference(chance=None, failure=episode.score.note)
    better, worse = first.score.value, second.score.value
    assert better is not None and worse is not None
    return Preference(chance=0.5 if better == worse else float(better > worse))


def _furthest(told: Sequence[_Pair]) -> list[_Pair]:
    """The pair of the answer that wins most and the one that wins least, where the two were told apart."""
    if len(told) < 2:
        return list(told)
    wins = _wins(told, lambda episode: episode.sample)
    ranked = sorted(wins, key=lambda sample: (-wins[sample], sample))
    ends = {ranked[0], ranked[-1]}
    return [pair for pair in told if {pair.first.sample, pair.second.sample} == ends] or list(told[:1])


def _row(task: Task, pair: _Pair) -> dict[str, Any]:
    chance = pair.found.chance
    assert chance is not None
    better, worse = (pair.first, pair.second) if chance > 0.5 else (pair.second, pair.first)
    row: dict[str, Any] = {
        "prompt": [message.as_dict() for message in task.messages],
        "chosen": [better.messages[-1].as_dict()],
        "rejected": [worse.messages[-1].as_dict()],
        "confidence": max(chance, 1 - chance),
        "task": task.id,
        "chosen_seed": better.seed,
        "rejected_seed": worse.seed,
    }
    if better.score.value is not None and worse.score.value is not None:
        row |= {"chosen_score": better.score.value, "rejected_score": worse.score.value}
    if pair.found.principle:
        row |= {"judged_by": pair.found.principle, "reasons": pair.found.reasons}
    return row


def _with_win_rates(groups: Sequence[Group], pairs: Sequence[_Pair]) -> tuple[Group, ...]:
    """The groups as the log shows them: each answer's score is its win rate, from -1 to 1."""
    wins = _wins(pairs, lambda episode: episode.seed)

    def rated(episode: Episode) -> Episode:
        return replace(episode, score=Score(value=2 * wins[episode.seed] - 1)) if episode.seed in wins else episode

    return tuple(replace(group, episodes=tuple(map(rated, group.episodes))) for group in groups)


def _wins(pairs: Sequence[_Pair], key: Callable[[Episode], int]) -> dict[int, float]:
    """The mean chance of each answer, by its key, to be better than those that it was compared with."""
    wins: dict[int, list[float]] = {}
    for pair in pairs:
        if (chance := pair.found.chance) is not None:
            wins.setdefault(key(pair.first), []).append(chance)
            wins.setdefault(key(pair.second), []).append(1 - chance)
    return {each: fmean(chances) for each, chances in wins.items()}


def _metrics(pairs: Sequence[_Pair], rows: Sequence[Row], tally: Counts) -> dict[str, float]:
    judged = [pair.found for pair in pairs if pair.found.chance is not None]
    lengths = [len(_answer(episode)) for pair in pairs for episode in (pair.first, pair.second)]
    longer = [len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows]
    counted = ("pairs/unjudged", "pairs/ties", "answers/same", "answers/unusable", "answers/cut_off")
    return {
        "pairs/judged": float(len(judged)),
        **dict.fromkeys(counted, 0.0),
        **tally,
        "pairs/unparsed": float(sum(pair.found.unparsed for pair in pairs)),
        "pairs/order_flips": _mean([float(found.flipped) for found in judged]),
        "pairs/confidence": _mean([row["confidence"] for row in rows]),
        "pairs/chosen_longer": _mean([float(flag) for flag in longer]),
        "answers/characters": _mean([float(length) for length in lengths]),
    }


def _answer(episode: Episode) -> str:
    return episode.messages[-1].content


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else float("nan")


def check_compare(context: Context[CompareStage]) -> Seen:
    """Its tasks, and that its judge knows how to ask."""
    if context.config.judge is not None:
        build_wording(context.config.judge)
    return check_tasks(context)


KIND = Kind(config=CompareStage, run=run_compare, check=check_compare, look=ROWS_LOOK)
