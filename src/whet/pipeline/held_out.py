"""Held-out data on the way of a stage: what is measured, which model was the best, and when to stop early.

Measuring moves nothing of training: its seeds are its own, its rewards are others, and what it writes is beside the
stage's files (`STAGE/evaluation/rollouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

from whet.algorithms.groups import measure_groups
from whet.config import SamplingConfig
from whet.config.held_out import BestConfig, Evaluation
from whet.config.problems import nearest
from whet.config.stage import StageBase
from whet.envs.base import Task
from whet.envs.tools.play import Environments
from whet.errors import ConfigError
from whet.evals.run import sampled_answers, summarise
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import chunks_of, find_tasks, player
from whet.pipeline.stage import Context, Interrupted, Policy, keep_dropped
from whet.records import Group, Metric, State, seed_of
from whet.rollouts.play import Player
from whet.tracking.log import RunLog

Measure = Callable[[int], Mapping[str, float]]
"""(step): numbers of the weights as they are after it; raises `Interrupted` where the run is asked to stop."""
SAMPLED = ("reward", "unscored", "completions/mean_length", "completions/clipped_ratio")


class HeldOut:
    """What a stage of so many steps measures, and (`state`, which a checkpoint has) what came of it so far."""

    def __init__(self, config: StageBase, steps: int, measures: Sequence[Measure]) -> None:
        self.steps, self.measures = steps, measures
        self.every: int = getattr(config, "eval_every", 1)
        self.best: BestConfig | None = getattr(config, "best", None)
        # With a `best`, a wrong name is found before the first step.
        self.at_start = self.best is not None or getattr(config, "evaluation", None) is not None
        names = ("seen", "best_step", "best", "worse")
        self.state = dict.fromkeys((f"held_out/{name}" for name in names), -1.0) if measures else {}

    def restore(self, state: State) -> dict[str, Any]:
        """Stand where the state was taken; returns what in it is not of held-out data."""
        self.state |= {name: state[name] for name in self.state if name in state}
        return {name: value for name, value in state.items() if not name.startswith("held_out/")}

    def due(self, step: int) -> bool:
        """Whether an evaluation after this step is still to be made."""
        asked = step % self.every == 0 if 0 < step < self.steps else step > 0 or self.at_start
        return bool(self.measures) and asked and self.state["held_out/seen"] < step

    @property
    def best_step(self) -> int:
        """The step after which the model was the best; -1: none was measured."""
        return int(self.state.get("held_out/best_step", -1))

    @property
    def over(self) -> str:
        """Why the stage ends early; empty where it goes on."""
        if self.best is None or self.best.patience is None or self.state["held_out/worse"] < self.best.patience:
            return ""
        value, count = self.state["held_out/best"], self.best.patience
        return f"no {self.best.metric} better than {value:.4g} (step {self.best_step}) in {count} evaluations"

    def look(self, step: int) -> dict[str, float]:
        """The numbers of held-out data after this step; `ConfigError` where the metric of `best` is none of them."""
        found = {f"eval_{name}": value for measure in self.measures for name, value in measure(step).items()}
        self.state["held_out/seen"] = step
        if self.best is not None:
            name = self.best.metric
            if name not in found:
                raise ConfigError(f"best.metric: no evaluation measures {name!r}{nearest(name, sorted(found))}")
            if self.best_step < 0 or self.best.better(found[name], self.state["held_out/best"]):
                self.state |= {"held_out/best_step": step, "held_out/best": found[name], "held_out/worse": 0}
            else:
                self.state["held_out/worse"] += 1
        return found


def sampling_of(evaluation: Evaluation | None) -> SamplingConfig:
    """How a stage samples that does so for its evaluation alone."""
    return SamplingConfig() if evaluation is None else evaluation.sampling


def of_rows(evaluate: Callable[[], Mapping[str, Metric]]) -> Measure:
    """The means of what an objective measures on held-out rows."""
    return lambda step: {name: metric.mean for name, metric in evaluate().items()}


@contextmanager
def of_tasks(
    context: Context[Any], environment: Environments | None = None
) -> Iterator[Callable[[Policy], list[Measure]]]:
    """The gate for the held-out tasks of a stage, if it has any; given the policy, what measures it on them.

    They are played in the stage's own `environment`.
    """
    config = context.config.evaluation
    if config is None:
        yield lambda _: []
        return
    with closing(rubric(config.tasks, config.rewards, context.world)) as grading:
        found = find_tasks(config, context.model, context.world, grading, environment)
        context.console.say(f"{context.name}: evaluation on {found.describe()}")
        keep_dropped(context, "evaluation", found.lost)
        tasks = list({task.id: task for task in found.tasks}.values())  # one listed twice is one question
        by = partial(player, grading=grading, sampling=config.sampling, environment=environment)
        yield lambda policy: [partial(_play, context, policy, tasks, partial(by, policy))]


def _play(
    context: Context[Any], policy: Policy, tasks: Sequence[Task], by: Callable[[], Player], step: int
) -> dict[str, float]:
    config = context.config.evaluation
    if policy.sampler.version != step:
        policy.hand_over(step)
    # The same seeds every time: differences between steps are then less noisy.
    play, seed, groups = by(), seed_of(context.seed, "evaluation"), list[Group]()
    for places, chunk in chunks_of(tasks, config.samples):
        if context.stopped():
            raise Interrupted
        groups += play.play(chunk, config.samples, step=step, seed=seed, positions=places).groups
    found = {name: x for name, x in measure_groups(groups).items() if name in SAMPLED or name.startswith("rewards/")}
    with suppress(ValueError):  # no reward says what is right
        row = summarise("policy", {group.task: sampled_answers(group) for group in groups})
        found |= {"solved": row.accuracy, "solved_low": row.low, "solved_high": row.high}
        found |= {f"pass@{k}": share for k, share in row.of_k["pass"].items() if k > 1}
    log = RunLog(context.folder / "evaluation", policy.template.decode)
    log.truncate(step - 1)
    log.write(step, found, groups)
    log.close()
    return found
