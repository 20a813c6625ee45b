"""What rewards say: of golds, of answers that deserve nothing, of what a model sampled; and of saved rollouts, again.

Nothing is written: a run that is looked at stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from whet.config import GeneratedConfig, TrainConfig
from whet.config.loading import Loaded, load_recipe
from whet.config.rewards import EnvironmentReward, RewardConfig, TurnsReward
from whet.data.faults import nearest
from whet.envs.base import Attempt, Task
from whet.envs.families import family
from whet.envs.probes import RIGHT, gold_text, probes
from whet.envs.rubric import WeightedRubric
from whet.envs.tools.play import Environments
from whet.errors import ConfigError, DataError, RunError
from whet.launch.world import LocalWorld
from whet.pipeline.load_data import rubric, tasks, usable
from whet.pipeline.playing import opened, player
from whet.pipeline.run import Run, context_of
from whet.pipeline.stage import Context
from whet.records import Ending, Message, Outcome, Score
from whet.tracking.console import Console
from whet.tracking.log import Rollout, read_rollouts, rollout_steps, rollout_tasks

CHUNK = 8
"""Tasks whose answers are graded in one call."""
BINS = 10
SHOWN = 5
"""Examples of a disagreement, and golds that are named because they are not right."""
SAMPLED, SAVED = "sampled", "rollouts"


@dataclass(frozen=True, slots=True)
class Bench:
    """A stage's tasks and rewards."""

    run: Run
    context: Context[Any]
    """Its model is one with the stage's tokenizer, which may be there before the stage's own."""
    tasks: Sequence[Task]
    grading: WeightedRubric
    environment: Environments | None
    """Where `samples` are played; what is not sampled is graded as the answer of a play in which nothing was called."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One answer and what the rewards gave it."""

    source: str
    """A name of `envs.probes`, or `sampled` or `rollouts`."""
    task: str
    answer: str
    score: Score


def try_rewards(
    loaded: Loaded,
    *,
    stage: str | None = None,
    limit: int = 64,
    samples: int = 0,
    model: str | None = None,
    rollouts: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """What the rewards of a stage give to golds, degenerate answers, `samples` of a model and a run's last rollouts.

    Raises `ConfigError` where the recipe has no such stage, `RunError` where `rollouts` is a run without any of it.
    """
    folder = rollouts or loaded.recipe.out or Path("runs") / loaded.recipe.name
    with _bench(Run(recipe=loaded.recipe, folder=folder), stage, quiet=quiet, plays=True) as bench:
        context, places = bench.context, range(0, len(bench.tasks), max(1, len(bench.tasks) // limit))[:limit]
        source = context.config.tasks
        if not isinstance(source, GeneratedConfig):
            source = source.model_copy(update={"on_bad_row": "drop"})
        template, window = context.world.template(context.model), context.world.max_length(context.model)
        asked = [bench.tasks[place] for place in places]
        some, lost, _ = usable(source, asked, bench.grading, template, window, bench.environment)
        found = list(_probed(bench, some, places))
        if samples:
            found += _sampled(bench, some, samples, model)
        for _, step, pairs in _saved(bench, folder, last=-(-limit // 16)):
            found += _grade(bench, [(SAVED, attempt) for _, attempt in pairs], step)
    if rollouts is not None and not any(each.source == SAVED for each in found):
        raise RunError(f"{rollouts}: holds no rollouts of {bench.context.name} with tasks of this recipe")
    wrong = [each for each in found if each.source == RIGHT[0] and each.score.correct is False]
    refused = {str(each.row): each.fault for each in lost.rows}
    refused |= {each.task: f"{each.answer[-80:]!r} is not right; {each.score.note}" for each in wrong[:SHOWN]}
    return {"stage": context.name, "tasks": len(some), "refused": refused, **_summary(bench.grading, found)}


def regrade(
    folder: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    last: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """A run's rollouts (those of the `last` steps; 0: all) graded again, and what changed, by reward.

    By the rewards of its own recipe or of another one. Raises `RunError` where there is no run or nothing to grade.
    """
    if not (folder / "recipe.json").is_file():
        raise RunError(f"{folder}: no run (it has no recipe.json); give the folder of one, such as runs/NAME")
    loaded = load_recipe(recipe or folder / "recipe.json", overrides)
    count, changes = 0, list[dict[str, Any]]()
    with _bench(Run(recipe=loaded.recipe, folder=folder), stage, quiet=quiet, plays=False) as bench:
        names = [reward.name for reward in bench.grading.rewards]
        for label, step, pairs in _saved(bench, folder, last=last):
            for (old, _), new in zip(pairs, _grade(bench, [("", each) for _, each in pairs], step), strict=True):
                where = {"model": label, "step": step, "task": old.task, "sample": old.sample}
                changes += [where | change for name in names for change in _changes(name, old, new.score)]
            count += len(pairs)
    if not count:
        raise RunError(f"{folder}: holds no rollouts of {bench.context.name} with tasks of the recipe")
    changed = {name: sum(change["reward"] == name for change in changes) for name in names}
    return {"stage": bench.context.name, "rollouts": count, "changed": changed, "changes": changes}


# ------------------------------------------------------------------------------------------- what is graded


@contextmanager
def _bench(run: Run, name: str | None, *, quiet: bool, plays: bool) -> Iterator[Bench]:
    """The stage that is asked for, or the only one that grades answers to tasks; with its environment if it `plays`."""
    stages = run.recipe.stages
    grading = [each for each in stages if getattr(stages[each], "tasks", None) and getattr(stages[each], "rewards", [])]
    if not grading:
        raise ConfigError(f"{run.recipe.name}: no stage has tasks and rewards; add one (rl, eval, online_preference)")
    if name is None and len(grading) > 1:
        raise ConfigError(f"{run.recipe.name}: several stages have rewards; choose with --stage {'|'.join(grading)}")
    if name is not None and name not in grading:
        raise ConfigError(f"--stage {name}: no stage of that name has rewards; {nearest(name, grading)}")
    with closing(Console(quiet=quiet)) as console:
        context = context_of(run, name or grading[0], LocalWorld(), console, lambda: False)
        context = replace(context, model=run.origin(run.model_of(context.name)))
        section, world = context.config, context.world
        environments = opened(getattr(section, "environment", None) if plays else None, world)
        with closing(rubric(section.tasks, section.rewards, world)) as rewards, environments as environment:
            yield Bench(run, context, tasks(section.tasks)[0], rewards, environment)


def _grade(bench: Bench, asked: Sequence[tuple[str, Attempt]], step: int) -> list[Graded]:
    scores = bench.grading.score([attempt for _, attempt in asked], step=step)
    return [Graded(source, a.task.id, a.answer, score) for (source, a), score in zip(asked, scores, strict=True)]


def _probed(bench: Bench, some: Sequence[Task], places: Sequence[int]) -> Iterator[Graded]:
    """Golds and degenerate answers to these tasks; generated ones are all usable, and have these places."""
    context = bench.context
    source, rewards, most = context.config.tasks, context.config.rewards, context.config.sampling.max_tokens
    golds = [gold_text(task, rewards) for task in some]
    if isinstance(source, GeneratedConfig):
        solved = family(source.model_copy(update={"plain": False})).demonstration
        golds = [said if isinstance(said := solved(place), str) else said[-1].content for place in places]
    attempts = [
        [(name, _attempt(context, task, said, most)) for name, said in given.items()]
        for task, given in zip(some, probes(some, golds, most=most), strict=True)
    ]
    context.console.begin(f"rewards of {context.name}", len(some))
    for first in range(0, len(some), CHUNK):
        yield from _grade(bench, [each for given in attempts[first : first + CHUNK] for each in given], step=1)
        context.console.log(context.name, min(first + CHUNK, len(some)), {}, ())


def _attempt(context: Context[Any], task: Task, said: str, most: int) -> Attempt:
    try:
        tokens = context.world.template(context.model).text(said).tokens if said else ()
    except DataError:  # it spells a special token, so no policy writes it
        tokens = ()
    message = Message(role="assistant", content=said)
    return Attempt(task=task, messages=(message,), completion_tokens=tokens, truncated=False, max_tokens=most)


def _sampled(bench: Bench, some: Sequence[Task], samples: int, model: str | None) -> list[Graded]:
    context, config = bench.context, bench.context.config.sampling
    start = bench.run.model_of(context.name) if model is None else context.model.at(model)
    if model is None and start != context.model:
        raise RunError(f"{start.path}: is not made yet; run the stages before {context.name}, or name a model with -m")
    play = player(context.world.policy(start, TrainConfig(), config), bench.grading, config, bench.environment)
    played = play.play(some, samples, step=1, seed=context.seed)
    episodes = [episode for group in played.groups for episode in group.episodes]
    return [Graded(SAMPLED, each.task, _last_said(each.messages), each.score) for each in episodes]


def _last_said(messages: Sequence[Message]) -> str:
    return next((message.content for message in reversed(messages) if message.role == "assistant"), "")


def _saved(bench: Bench, run: Path, *, last: int) -> Iterator[tuple[str, int, list[tuple[Rollout, Attempt]]]]:
    """A run's rollouts of a stage, step by step (the `last` ones), as they were graded; of an evaluation, by model."""
    stage = next(iter(run.glob(f"stages/*-{bench.context.name}")), run)
    folders = [stage, *(folder for folder in sorted(stage.glob("*")) if folder.is_dir())]
    files = [(folder, step) for folder in folders for step in rollout_steps(folder)[-last:]]
    needed = {task for file in files for task in rollout_tasks(*file)}
    known = {task.id: task for task in bench.tasks if task.id in needed} if needed else {}
    bench.context.console.begin(f"rollouts of {bench.context.name}", len(files))
    for number, (folder, step) in enumerate(files, start=1):
        read = read_rollouts(folder, step)
        pairs = [(old, each) for old in read if (each := _again(bench.context, old, known.get(old.task)))]
        if pairs:
            yield "" if folder == stage else folder.name, step, pairs
        bench.context.console.log(bench.context.name, number, {}, ())


def _again(context: Context[Any], old: Rollout, task: Task | None) -> Attempt | None:
    """What was graded; None where the task is another by now, or nothing was answered."""
    played = getattr(context.config, "environment", None) is not None
    added = None if task is None else _added(old.messages, task.messages, played=played)
    if task is None or added is None or not any(message.role == "assistant" for message in added):
        return None
    sampled = zip(old.completion_tokens, old.logprobs, strict=True)
    room = context.world.max_length(context.model) - len(old.prompt_tokens)
    return Attempt(
        task=task,
        messages=added,
        completion_tokens=tuple(token for token, logprob in sampled if logprob is not None),
        truncated=old.ending == Ending.LENGTH or old.outcome == Outcome.TRUNCATED,
        max_tokens=min(context.config.sampling.max_tokens, room),
        **(_noted(old, context.config.rewards) if played else {}),
    )


def _added(said: Sequence[Message], asked: Sequence[Message], *, played: bool) -> tuple[Message, ...] | None:
    """What came after a task's messages, from the first answer on; None where they are others.

    An environment may put a system message before them, text behind them, and messages after them.
    """
    if played and said and said[0].role == "system" != asked[0].role:
        said = said[1:]
    before, rest = said[: len(asked)], said[len(asked) :]
    if [m.content for m in before[:-1]] != [m.content for m in asked[:-1]] or len(before) < len(asked):
        return None
    if not played:
        return tuple(rest) if before[-1].content == asked[-1].content else None
    first = next((place for place, message in enumerate(rest) if message.role == "assistant"), len(rest))
    return tuple(rest[first:]) if before[-1].content.startswith(asked[-1].content) else None


def _noted(old: Rollout, rewards: Sequence[RewardConfig]) -> dict[str, Any]:
    """What the environment said of a play, which is over: it stands in the values of the rewards that pass it on."""
    worth: Mapping[str, float] = {}
    turns: tuple[float, ...] = ()
    for reward in rewards:
        name = reward.name or reward.kind
        value, inner = old.parts.get(name), f"{name}/"
        if value is not None and isinstance(reward, EnvironmentReward):
            named = {key.removeprefix(inner): part for key, part in old.parts.items() if key.startswith(inner)}
            worth = {key: part for key, part in named.items() if part is not None} or {name: value}
        elif value is not None and isinstance(reward, TurnsReward):
            turns = (value,)
    return {"worth": worth, "turn_rewards": turns}


# --------------------------------------------------------------------------------------------- what is said


def _changes(name: str, old: Rollout, new: Score) -> Iterator[dict[str, Any]]:
    """What one reward says otherwise than it did, and its reason where it gives one."""
    before, after = old.parts.get(name), new.parts.get(name)
    if before == after or (before is not None and after is not None and abs(before - after) < 1e-6):
        return
    reason = next(iter([*_said(name, new), *_said(name, old)]), "" if name in old.parts else "no reward of the run")
    yield {"reward": name, "old": before, "new": after, "reason": reason}


def _said(name: str, score: Score | Rollout) -> list[str]:
    """What one reward noted, or why it failed."""
    return re.findall(rf"(?:^|; ){re.escape(name)}: (.*?)(?=; [\w/]+: |$)", score.note, re.DOTALL)


def _summary(grading: WeightedRubric, found: Sequence[Graded]) -> dict[str, Any]:
    """By source, by reward, and by two rewards that both say what is right."""
    values = [each.score.value for each in found if each.score.value is not None] or [0.0]
    span = (min(values), max(values))
    names = dict.fromkeys(each.source for each in found)
    sources = {name: _of_source([each for each in found if each.source == name], span) for name in names}
    empty = [name for name in names if name not in (*RIGHT, SAMPLED, SAVED) and sources[name]["mean"] is not None]
    judges = [reward.name for reward in grading.rewards if reward.judges]
    return {
        "range": span,
        "sources": sources,
        "wins_with": max(empty, key=lambda name: sources[name]["mean"], default=None),
        "rewards": {reward.name: _of_reward(reward.name, grading, found) for reward in grading.rewards},
        "disagreements": [_apart(first, second, found) for first, second in combinations(judges, 2)],
    }


def _of_source(some: Sequence[Graded], span: tuple[float, float]) -> dict[str, Any]:
    """Means and a histogram of the scores; of a model's answers also the shares of tasks with one verdict on all."""
    values = [each.score.value for each in some if each.score.value is not None]
    groups: dict[str, list[bool]] = {each.task: [] for each in some if each.score.correct is not None}
    for each in some:
        if each.score.correct is not None:
            groups[each.task].append(each.score.correct)
    right = np.array([np.mean(group) for group in groups.values()])
    found = {
        "answers": len(some),
        "unscored": len(some) - len(values),
        "broke_a_grader": [each.score.note for each in some if each.score.outcome is Outcome.GRADER_GAVE_UP],
        "mean": float(np.mean(values)) if values else None,
        "right": float(right.mean()) if groups else None,
        "histogram": np.histogram(values, BINS, span)[0].tolist(),
    }
    if groups and some[0].source in (SAMPLED, SAVED):
        found |= {"all_right": float((right == 1).mean()), "all_wrong": float((right == 0).mean())}
    return found


def _of_reward(name: str, grading: WeightedRubric, found: Sequence[Graded]) -> dict[str, Any]:
    """How long it took, in milliseconds an answer, and how often and why it failed."""
    took = grading.took[name] or [0.0]
    failed = [said for each in found if each.score.value is None for said in _said(name, each.score)]
    times = {"mean_ms": 1000 * float(np.mean(took)), "worst_ms": 1000 * max(took)}
    return {**times, "failures": len(failed), "first_failure": failed[0] if failed else ""}


def _apart(first: str, second: str, found: Sequence[Graded]) -> dict[str, Any]:
    """How often one of two rewards calls an answer right and the other does not."""
    said = [(each, each.score.parts.get(first), each.score.parts.get(second)) for each in found]
    both = [(each, a, b) for each, a, b in said if a is not None and b is not None]
    apart = [{"task": e.task, "answer": e.answer, first: a, second: b} for e, a, b in both if (a >= 1) != (b >= 1)]
    return {"rewards": [first, second], "answers": len(both), "apart": len(apart), "examples": apart[:SHOWN]}
