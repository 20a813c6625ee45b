"""What rewards say: of golds, of answers that deserve nothing, of what a model sampled; and of saved rollouts, again.

Nothing is written: a run that is looked at stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from whet.config import GeneratedConfig, TrainConfig
from whet.config.loading import Loaded, load_recipe
from whet.data.faults import nearest
from whet.envs.base import Attempt, Task
from whet.envs.library import family
from whet.envs.probes import RIGHT, gold_text, probes
from whet.envs.rubric import WeightedRubric
from whet.errors import ConfigError, DataError, RunError
from whet.launch.check import tokenizer_of
from whet.launch.talk import find_model
from whet.launch.world import LocalWorld
from whet.pipeline.load_data import rubric, tasks
from whet.pipeline.playing import player
from whet.pipeline.run import Run, context_of
from whet.pipeline.stage import Context
from whet.records import Ending, Message, Outcome, Score
from whet.tracking.console import Console
from whet.tracking.log import Rollout, read_rollouts, rollout_steps, rollout_tasks

CHUNK = 8
"""Tasks whose answers are graded in one call."""
BINS = 10
SHOWN = 5
"""Examples of a disagreement."""
SAMPLED, SAVED = "sampled", "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A stage's tasks and rewards."""

    run: Run
    context: Context[Any]
    """Its model is one with the stage's tokenizer, which may be there before the stage's own."""
    tasks: Sequence[Task]
    grading: WeightedRubric


@dataclass(frozen=True, slots=True, kw_only=True)
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
    with _bench(Run(recipe=loaded.recipe, folder=folder), stage, quiet=quiet) as bench:
        places = range(0, len(bench.tasks), max(1, len(bench.tasks) // limit))[:limit]
        problems = {place: why for place in places if (why := _refusal(bench, bench.tasks[place]))}
        places = [place for place in places if place not in problems]
        found = [*_probed(bench, places), *(_sampled(bench, places, samples, model) if samples else ())]
        for _, step, pairs in _saved(bench, folder, last=-(-limit // 16)):
            scores = bench.grading.score([attempt for _, attempt in pairs], step=step)
            found += [_graded(SAVED, each, score) for (_, each), score in zip(pairs, scores, strict=True)]
    if rollouts is not None and not any(each.source == SAVED for each in found):
        raise RunError(f"{rollouts}: holds no rollouts of {bench.context.name} with tasks of this recipe")
    refused = {bench.tasks[place].id: why for place, why in problems.items()}
    return {"stage": bench.context.name, "tasks": len(places), "refused": refused, **_summary(bench.grading, found)}


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
    with _bench(Run(recipe=loaded.recipe, folder=folder), stage, quiet=quiet) as bench:
        names = [reward.name for reward in bench.grading.rewards]
        for label, step, pairs in _saved(bench, folder, last=last):
            scores = bench.grading.score([attempt for _, attempt in pairs], step=step)
            for (old, _), score in zip(pairs, scores, strict=True):
                where = {"model": label, "step": step, "task": old.task, "sample": old.sample}
                changes += [{**where, **change} for name in names if (change := _change(name, old, score))]
            count += len(pairs)
    if not count:
        raise RunError(f"{folder}: holds no rollouts of {bench.context.name} with tasks of the recipe")
    changed = {name: sum(change["reward"] == name for change in changes) for name in names}
    return {"stage": bench.context.name, "rollouts": count, "changed": changed, "changes": changes}


# ------------------------------------------------------------------------------------------- what is graded


@contextmanager
def _bench(run: Run, name: str | None, *, quiet: bool) -> Iterator[Bench]:
    """The stage that is asked for, or the only one that grades answers to tasks."""
    stages = run.recipe.stages
    grading = [each for each in stages if getattr(stages[each], "tasks", None) and getattr(stages[each], "rewards", [])]
    if not grading:
        raise ConfigError(f"{run.recipe.name}: no stage has tasks and rewards; add one (rl, eval, online_preference)")
    if name is None and len(grading) > 1:
        raise ConfigError(f"{run.recipe.name}: several stages have rewards; choose with --stage {'|'.join(grading)}")
    if name is not None and name not in grading:
        raise ConfigError(f"--stage {name}: no stage of that name has rewards; {nearest(name, grading)}")
    console = Console(quiet=quiet)
    context = context_of(run, name or grading[0], LocalWorld(), console, lambda: False)
    context = replace(context, model=tokenizer_of(run, context.name))
    listed, _ = tasks(context.config.tasks)
    rewards = rubric(context.config.tasks, context.config.rewards, context.world)
    try:
        yield Bench(run=run, context=context, tasks=listed, grading=rewards)
    finally:
        rewards.close()
        console.close()


def _refusal(bench: Bench, task: Task) -> str:
    try:
        bench.grading.check([task])
    except DataError as error:
        return str(error).removeprefix(f"task {task.id}: ")
    return ""


def _probed(bench: Bench, places: Sequence[int]) -> Iterator[Graded]:
    """Golds and degenerate answers to these tasks."""
    context = bench.context
    some, most = [bench.tasks[place] for place in places], context.config.sampling.max_tokens
    answers = probes(some, [_gold(context, bench.tasks[place], place) for place in places], most=most)
    context.console.begin(f"rewards of {context.name}", -(-len(some) // CHUNK))
    for number, first in enumerate(range(0, len(some), CHUNK), start=1):
        chunk = slice(first, first + CHUNK)
        asked = [
            (each, *item) for each, given in zip(some[chunk], answers[chunk], strict=True) for item in given.items()
        ]
        attempts = [_attempt(context, task, said) for task, _, said in asked]
        scores = bench.grading.score(attempts, step=number)
        yield from map(_graded, [name for _, name, _ in asked], attempts, scores)
        context.console.log(context.name, number, {}, ())


def _gold(context: Context[Any], task: Task, index: int) -> str | None:
    if not isinstance(context.config.tasks, GeneratedConfig):
        return gold_text(task, context.config.rewards)
    solved = family(context.config.tasks.model_copy(update={"plain": False})).demonstration(index)
    return solved if isinstance(solved, str) else solved[-1].content


def _attempt(context: Context[Any], task: Task, said: str) -> Attempt:
    try:
        tokens = context.world.template(context.model).text(said).tokens if said else ()
    except DataError:  # it spells a special token, so no policy writes it
        tokens = ()
    return Attempt(
        task=task,
        messages=(Message(role="assistant", content=said),),
        completion_tokens=tokens,
        truncated=False,
        max_tokens=context.config.sampling.max_tokens,
    )


def _sampled(bench: Bench, places: Sequence[int], samples: int, model: str | None) -> list[Graded]:
    context = bench.context
    start = bench.run.model_of(context.name) if model is None else context.model.at(find_model(model))
    play = player(
        context.world.policy(start, TrainConfig(), context.config.sampling), bench.grading, context.config.sampling
    )
    played = play.play([bench.tasks[place] for place in places], samples, step=1, seed=context.seed)
    episodes = [episode for group in played.groups for episode in group.episodes]
    return [Graded(source=SAMPLED, task=e.task, answer=e.messages[-1].content, score=e.score) for e in episodes]


def _graded(source: str, attempt: Attempt, score: Score) -> Graded:
    return Graded(source=source, task=attempt.task.id, answer=attempt.answer, score=score)


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
    if task is None or [m.content for m in old.messages[: len(task.messages)]] != [m.content for m in task.messages]:
        return None
    added = old.messages[len(task.messages) :]
    if not any(message.role == "assistant" for message in added):
        return None
    sampled = zip(old.completion_tokens, old.logprobs, strict=True)
    room = context.world.max_length(context.model) - len(old.prompt_tokens)
    return Attempt(
        task=task,
        messages=added,
        completion_tokens=tuple(token for token, logprob in sampled if logprob is not None),
        truncated=old.ending == Ending.LENGTH or old.outcome == Outcome.TRUNCATED,
        max_tokens=min(context.config.sampling.max_tokens, room),
    )


# --------------------------------------------------------------------------------------------- what is said


def _change(name: str, old: Rollout, new: Score) -> dict[str, Any] | None:
    """What one reward says otherwise than it did, and its reason where it gives one."""
    before, after = old.parts.get(name), new.parts.get(name)
    if before == after or (before is not None and after is not None and abs(before - after) < 1e-6):
        return None
    notes = [part for note in (new.note, old.note) for part in note.split("; ") if part.startswith(f"{name}: ")]
    reason = notes[0].removeprefix(f"{name}: ") if notes else "" if name in old.parts else "it was no reward of the run"
    return {"reward": name, "old": before, "new": after, "reason": reason}


def _summary(grading: WeightedRubric, found: Sequence[Graded]) -> dict[str, Any]:
    values = [each.score.value for each in found if each.score.value is not None] or [0.0]
    span = (min(values), max(values))
    names = list(dict.fromkeys(each.source for each in found))
    sources = {name: _of_source([each for each in found if each.source == name], span) for name in names}
    mean = {name: each["mean"] for name, each in sources.items() if each["mean"] is not None}
    empty = {name: mean[name] for name in mean if name not in (*RIGHT, SAMPLED, SAVED)}
    judges = [reward.name for reward in grading.rewards if reward.judges]
    return {
        "range": span,
        "sources": sources,
        "wins_with": max(empty, key=lambda name: empty[name], default=None),
        "rewards": {reward.name: _of_reward(reward.name, grading, found) for reward in grading.rewards},
        "disagreements": [_apart(first, second, found) for first, second in combinations(judges, 2)],
    }


def _of_source(some: Sequence[Graded], span: tuple[float, float]) -> dict[str, Any]:
    """Means and a histogram of the scores; of a model's answers also the shares of tasks with one verdict on all."""
    values = [each.score.value for each in some if each.score.value is not None]
    groups: dict[str, list[bool]] = {}
    for each in some:
        if each.score.correct is not None:
            groups.setdefault(each.task, []).append(each.score.correct)
    found = {
        "answers": len(some),
        "unscored": len(some) - len(values),
        "mean": float(np.mean(values)) if values else None,
        "right": float(np.mean([right for group in groups.values() for right in group])) if groups else None,
        "histogram": np.histogram(values, BINS, span)[0].tolist(),
    }
    if groups and some[0].source in (SAMPLED, SAVED):
        found["all_right"] = float(np.mean([all(group) for group in groups.values()]))
        found["all_wrong"] = float(np.mean([not any(group) for group in groups.values()]))
    return found


def _of_reward(name: str, grading: WeightedRubric, found: Sequence[Graded]) -> dict[str, Any]:
    """How long it took, in milliseconds an answer, and how often and why it failed."""
    took = grading.took[name] or [0.0]
    failed = [each.score.note for each in found if each.score.value is None and f"{name}: " in each.score.note]
    times = {"mean_ms": 1000 * float(np.mean(took)), "worst_ms": 1000 * max(took)}
    return {**times, "failures": len(failed), "first_failure": failed[0] if failed else ""}


def _apart(first: str, second: str, found: Sequence[Graded]) -> dict[str, Any]:
    """How often one of two rewards calls an answer right and the other does not."""
    said = [(each, each.score.parts.get(first), each.score.parts.get(second)) for each in found]
    both = [(each, a, b) for each, a, b in said if a is not None and b is not None]
    apart = [
        {"source": each.source, "task": each.task, "answer": each.answer, first: a, second: b}
        for each, a, b in both
        if (a >= 1) != (b >= 1)
    ]
    return {"rewards": [first, second], "answers": len(both), "apart": len(apart), "examples": apart[:SHOWN]}
