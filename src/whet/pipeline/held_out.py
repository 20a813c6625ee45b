"""Held-out data on the way of a stage: what is measured, which model was the best, and when to stop early.

Measuring moves nothing of training: its seeds are its own, its rewards are others, and what it writes is beside the
stage's files (`STAGE/evaluation/rollouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any

from whet.algorithms.rollout_metrics import measure_groups
from whet.config import SamplingConfig
from whet.config.held_out import BestConfig, Evaluation, TrainingStage
from whet.config.problems import nearest
from whet.envs.base import Rubric, Task
from whet.errors import ConfigError, TrainingError
from whet.evals.run import sampled_answers, summarise
from whet.pipeline.dropped import keep_dropped
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import playable, player
from whet.pipeline.stage import Context, Interrupted, Policy
from whet.records import Group, Metric, State, seed_of
from whet.tracking.log import RunLog

Measure = Callable[[int], Mapping[str, float]]
"""(step): numbers of the weights as they are after it; raises `Interrupted` where the run is asked to stop."""
CHUNK_EPISODES = 512
"""Episodes that are played at once; between them a stop is looked for."""
SAMPLED = ("reward", "unscored", "completions/mean_length", "completions/clipped_ratio")


@dataclass(kw_only=True)
class HeldOut:
    """What a stage measures, and, from `seen` on, what came of it so far."""

    steps: int
    measures: Sequence[Measure] = ()
    every: int = 1
    best: BestConfig | None = None
    at_start: bool = False
    """Whether the model that the stage starts from is measured, too."""
    seen: int = -1
    """The last step that was measured."""
    best_step: int = -1
    best_value: float = 0.0
    worse: int = 0
    """Evaluations since the best one."""

    @classmethod
    def of(cls, config: TrainingStage, steps: int, measures: Sequence[Measure]) -> HeldOut:
        """What a stage of so many steps asks for. With a `best`, a wrong name is found before the first step."""
        at_start = config.best is not None or getattr(config, "evaluation", None) is not None
        return cls(measures=measures, every=config.eval_every, steps=steps, best=config.best, at_start=at_start)

    @property
    def state(self) -> dict[str, float]:
        """What `restore` goes on from."""
        names = ("seen", "best_step", "best_value", "worse")
        return {f"held_out/{name}": float(getattr(self, name)) for name in names} if self.measures else {}

    def restore(self, state: State) -> dict[str, Any]:
        """Stand where the state was taken; returns what in it is not of held-out data."""
        for name in ("seen", "best_step", "worse"):
            setattr(self, name, int(state.get(f"held_out/{name}", getattr(self, name))))
        self.best_value = state.get("held_out/best_value", self.best_value)
        return {name: value for name, value in state.items() if not name.startswith("held_out/")}

    def due(self, step: int) -> bool:
        """Whether an evaluation after this step is still to be made."""
        asked = step % self.every == 0 or step == self.steps
        return bool(self.measures) and asked and self.seen < step and (step > 0 or self.at_start)

    @property
    def over(self) -> bool:
        """Whether nothing was better for too long."""
        return self.best is not None and self.best.patience is not None and self.worse >= self.best.patience

    @property
    def why_over(self) -> str:
        """`no eval_loss better than 1.25 (step 40) in 3 evaluations`."""
        assert self.best is not None, "nothing else is ever over"
        known = f"than {self.best_value:.4g} (step {self.best_step})" if self.best_step >= 0 else "than none"
        return f"no {self.best.metric} better {known} in {self.worse} evaluations"

    @property
    def kept(self) -> int:
        """The step of the best model. Raises `TrainingError` where no evaluation came to a number."""
        if self.best_step < 0:
            raise TrainingError("best.metric was not a number in any evaluation, so there is no best model")
        return self.best_step

    def look(self, step: int) -> dict[str, float]:
        """The numbers of held-out data after this step, as `eval_NAME`.

        Raises `ConfigError` where the metric of `best` is none of them.
        """
        found = {f"eval_{name}": value for measure in self.measures for name, value in measure(step).items()}
        if self.best is not None:
            if self.best.metric not in found:
                raise ConfigError(f"best.metric: no evaluation measures {self.best.metric!r}"
                                  f"{nearest(self.best.metric, sorted(found))}")  # fmt: skip
            value = found[self.best.metric]
            if not isnan(value) and (self.best_step < 0 or self.best.better(value, self.best_value)):
                self.best_step, self.best_value, self.worse = step, value, 0
            else:
                self.worse += 1
        self.seen = step
        return found


def sampling_of(evaluation: Evaluation | None) -> SamplingConfig:
    """How a stage samples that does so for its evaluation alone."""
    return SamplingConfig() if evaluation is None else evaluation.sampling


def of_rows(evaluate: Callable[[], Mapping[str, Metric]]) -> Measure:
    """The means of what an objective measures on held-out rows."""
    return lambda step: {name: metric.mean for name, metric in evaluate().items()}


@contextmanager
def of_tasks(context: Context[Any]) -> Iterator[Callable[[Policy], list[Measure]]]:
    """The gate for the held-out tasks of a stage, if it has any; given the policy, what measures it on them."""
    config = context.config.evaluation
    if config is None:
        yield lambda _: []
        return
    with closing(rubric(config.tasks, config.rewards, context.world)) as grading:
        most = config.sampling.max_tokens
        found = playable(config.tasks, context.model, context.world, grading, max_tokens=most)
        context.console.say(f"{context.name}: evaluation on {found.describe()}")
        keep_dropped(context, "evaluation", found.lost)
        tasks = list({task.id: task for task in found.tasks}.values())  # one listed twice is one question
        yield lambda policy: [partial(_play, context, policy, tasks, grading)]


def _play(context: Context[Any], policy: Policy, tasks: Sequence[Task], grading: Rubric, step: int) -> dict[str, float]:
    config = context.config.evaluation
    if policy.sampler.version != step:
        policy.hand_over(step)
    own = getattr(context.config, "environment", None)
    play, size = player(policy, grading, config.sampling, own), max(1, CHUNK_EPISODES // config.samples)
    groups: list[Group] = []
    for first in range(0, len(tasks), size):
        if context.stopped():
            raise Interrupted
        chunk = tasks[first : first + size]
        # The same seeds every time: differences between steps are then less noisy.
        seed, places = seed_of(context.seed, "evaluation"), range(first, first + len(chunk))
        groups += play.play(chunk, config.samples, step=step, seed=seed, positions=places).groups
    measured = _measured(groups)
    log = RunLog(context.folder / "evaluation", policy.template.decode)
    log.truncate(step - 1)
    log.write(step, measured, groups)
    log.close()
    return measured


def _measured(groups: Sequence[Group]) -> dict[str, float]:
    """As in training, and of the share that is right its 95 % interval over tasks, and pass@k."""
    found = {name: x for name, x in measure_groups(groups).items() if name in SAMPLED or name.startswith("rewards/")}
    answers = {group.task: sampled_answers(group) for group in groups}
    if not any(answer.correct is not None for given in answers.values() for answer in given):
        return found
    row = summarise("policy", answers)
    found |= {"solved": row.accuracy, "solved_low": row.low, "solved_high": row.high}
    return found | {f"pass@{k}": share for k, share in row.pass_at_k.items() if k > 1}
