"""The evaluation stage: several models on the same held-out tasks, with paired intervals.

Each model's answers are kept before the next one is loaded, so an interrupted evaluation goes on with the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from whet.config import EvalStage, ModelConfig, TrainConfig
from whet.config.evaluation import ThinkingBudgets
from whet.config.rewards import name_of
from whet.envs.base import Rubric, Task
from whet.envs.rewards.answers import whole_answer
from whet.envs.rewards.reading import vote
from whet.envs.tools.play import Environments
from whet.errors import ConfigError, RewardError, TrainingError
from whet.evals.interference import interference
from whet.evals.run import EvalRow, SampledAnswer, compare, sampled_answers, summarise, table
from whet.files import read_json, write_json
from whet.models.tokenizer import load_tokenizer
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import check_tasks, chunks_of, find_tasks, opened, player
from whet.pipeline.stage import Context, Interrupted, Kind, Policy, keep_dropped
from whet.records import Episode, Group
from whet.sampling.budget import BudgetSampler
from whet.tracking.log import RunLog

COMPARE = ("verifier", "math", "answer", "exact")
"""Kinds of rewards that compare a final answer with a gold one."""
CHOOSE = ("model", "ensemble", "process_model", "judge")
"""Kinds of which best-of-n is worth knowing: they grade answers without a gold one."""


def run_eval(context: Context[EvalStage]) -> list[EvalRow]:
    """Play every task with every model, and write `eval.json`."""
    with opened(context.config.environment, context.world) as environment:
        return _run(context, environment)


def _run(context: Context[EvalStage], environment: Environments | None) -> list[EvalRow]:
    config = context.config
    if label := next((label for label in context.models if not re.fullmatch(r"\w[\w.+-]*", label)), None):
        raise ConfigError(f"models: the label {label!r} names files; use letters, digits and . _ + - in it")
    with closing(rubric(config.tasks, config.rewards, context.world)) as grading:
        first = next(iter(context.models.values()))
        found = find_tasks(config, first, context.world, grading, environment)
        # A problem that is listed twice is one question: counting it twice would narrow the intervals.
        problems = list({task.id: task for task in found.tasks}.values())
        keep_dropped(context, "tasks", found.lost)
        context.console.say(
            f"{context.name}: {found.describe()}, {len(problems):,} different, x {config.samples} samples"
        )
        budgets = [None] if config.budgets is None else sorted(set(config.budgets.tokens))
        answers = {
            turn: _answers(context, turn, model, problems, grading, environment)
            for label, model in context.models.items()
            for turn in (_Turn(label, thinking) for thinking in budgets)
        }
    # `whet eval -m` may bring models of other names: the first of them is then what gains are over.
    first_label = next(iter(context.models))
    baseline = config.baseline if config.baseline is not None and config.baseline in context.models else first_label
    try:
        choosers = [name_of(each) for each in config.rewards if each.kind in CHOOSE and not each.says_right]
        rows = _compared(answers, baseline, choosers)
    except ValueError as error:
        raise RewardError(f"{context.name}: {error}; the answers are in {context.folder}/*/rollouts") from error
    effect = _interference(context, rows)
    write_json(context.folder / "eval.json", table(rows) | ({"interference": effect} if effect else {}))
    told = {f"{name}/{row.label}": value for row in rows for name, value in _numbers(row).items()}
    for sink in context.sinks:
        if sink is not context.console:
            sink.log(context.name, 1, told, ())
    _guard(context, rows)
    return rows


@dataclass(frozen=True, slots=True)
class _Turn:
    """A model under one budget of thinking, or under none."""

    model: str
    thinking: int | None = None

    @property
    def label(self) -> str:
        """`rl`, or `rl+256` with a budget."""
        return self.model if self.thinking is None else f"{self.model}+{self.thinking}"


def _compared(
    answers: Mapping[_Turn, Mapping[str, Sequence[SampledAnswer]]], baseline: str, choosers: Sequence[str]
) -> list[EvalRow]:
    """The rows, each with its gain over the baseline under the same budget; of one model over its smallest budget."""
    rows = {
        turn: replace(summarise(turn.label, given, choosers), model=turn.model, thinking=turn.thinking)
        for turn, given in answers.items()
    }
    several = len({turn.model for turn in rows}) > 1
    found: dict[str, EvalRow] = {}
    for budget in dict.fromkeys(turn.thinking if several else None for turn in rows):
        group = [row for turn, row in rows.items() if not several or turn.thinking == budget]
        first = _Turn(baseline, budget if several else group[0].thinking).label
        found |= {row.label: row for row in compare(group, baseline=first)}
    return [found[turn.label] for turn in rows]


def _interference(context: Context[EvalStage], rows: Sequence[EvalRow]) -> dict[str, float]:
    """How far training on calls and training on the rest add up, where that is asked and the four models are there."""
    asked, scores = context.config.interference, {row.label: row.scores for row in rows}
    if asked is None or not {asked.base, asked.tool, asked.reasoning, asked.both} <= scores.keys():
        return {}
    found = interference(scores[asked.base], scores[asked.tool], scores[asked.reasoning], scores[asked.both])
    shares = ", ".join(
        f"{name} 0 in {found[name]:.1%} ({found[f'{name}_low']:.1%} to {found[f'{name}_high']:.1%})"
        for name in ("below", "above")
    )
    mean = f"{found['mean']:+.3f} ({found['mean_low']:+.3f} to {found['mean_high']:+.3f})"
    context.console.say(f"{context.name}: interaction of calls and the rest {mean}, {shares} of the questions")
    return found


def _guard(context: Context[EvalStage], rows: Sequence[EvalRow]) -> None:
    """Raise `TrainingError` where the last model is surely worse than the baseline by more than is allowed."""
    allowed, last = context.config.guard, rows[-1]
    if allowed is None or last.gain is None or last.gain_low is None or last.gain_high is None:
        return
    if last.gain_high < -allowed:
        raise TrainingError(
            f"{context.name}: guard: {last.label} lost {-100 * last.gain:.1f} points (95 % interval "
            f"{100 * last.gain_low:+.1f} to {100 * last.gain_high:+.1f}) and {100 * allowed:g} are allowed; its "
            f"answers are in {context.folder / last.label}; go on all the same with stages.{context.name}.guard=null"
        )


def _numbers(row: EvalRow) -> dict[str, float]:
    """The metrics of a model for trackers."""
    gain = {} if row.gain is None else {"gain": row.gain}
    return {"accuracy": row.accuracy, "mean_length": row.mean_length, "truncated": row.truncated, **gain}


def _answers(
    context: Context[EvalStage],
    turn: _Turn,
    model: ModelConfig,
    problems: Sequence[Task],
    grading: Rubric,
    environment: Environments | None,
) -> dict[str, list[SampledAnswer]]:
    """The graded answers of one model, task by task; from its file if an earlier run got that far."""
    config, label = context.config, turn.label
    done = context.checkpoints / f"answers-{label}.json"
    if done.exists():
        return {task: [SampledAnswer(**answer) for answer in given] for task, given in read_json(done).items()}
    if context.stopped():
        raise Interrupted
    policy = context.world.policy(model, TrainConfig(), config.sampling)
    play = player(policy, grading, config.sampling, environment)
    if turn.thinking is not None and config.budgets is not None:
        play = replace(play, sampler=_within(turn.thinking, config.budgets, policy, load_tokenizer(model)))
    voted = _voted(config, problems)
    log = RunLog(context.folder / label, policy.template.decode)
    log.truncate(0)
    answers: dict[str, list[SampledAnswer]] = {}
    chunks = chunks_of(problems, config.samples)
    context.console.begin(f"{context.name} {label}", len(chunks))
    for number, (places, chunk) in enumerate(chunks, start=1):
        # The same seeds for every model: differences between models are then less noisy.
        played = play.play(chunk, config.samples, step=number, seed=context.seed, positions=places)
        log.write(number, {}, played.groups)
        answers |= {group.task: sampled_answers(group, voted) for group in played.groups}
        right = [answer.correct for given in answers.values() for answer in given if answer.correct is not None]
        if not right:
            raise RewardError(f"{context.name}: no answer of {label} could be graded; {_why_ungraded(played.groups)}")
        context.console.log(f"{context.name} {label}", number, {"solved": sum(right) / len(right)}, played.groups)
        if context.stopped() and number < len(chunks):
            raise Interrupted
    log.close()
    context.console.close()
    write_json(done, {task: [asdict(answer) for answer in given] for task, given in answers.items()})
    return answers


def _voted(config: EvalStage, problems: Sequence[Task]) -> Callable[[Episode], str | None]:
    """What an answer says, where the first reward that judges compares it with a gold one: only then a majority means
    something."""
    judge = next((each for each in config.rewards if each.says_right), None)
    if judge is None or judge.kind not in COMPARE:
        return lambda _: None
    tasks = {task.id: task for task in problems}

    def said(episode: Episode) -> str | None:
        task = tasks[episode.task]
        answer = next((m.content for m in reversed(episode.messages) if m.role == "assistant"), "")
        if task.columns.get("verifier") in (None, "math", "answer"):
            return vote(answer, task.messages[-1].content)
        compared = task.columns["verifier"] != "instructions"  # whose answers are texts of any kind
        return (" ".join(whole_answer(answer).split()).casefold() or None) if compared else None

    return said


def _within(thinking: int, budgets: ThinkingBudgets, policy: Policy, tokenizer: Any) -> BudgetSampler:
    def encode(text: str) -> Sequence[int]:
        found: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    return BudgetSampler(
        sampler=policy.sampler,
        thinking=thinking,
        end=budgets.end,
        cut=encode(f"\n{budgets.end}\n\n" if budgets.cut is None else budgets.cut),
        wait=encode(budgets.wait),
        extensions=budgets.extend,
        max_length=policy.max_length,
        decode=policy.template.decode,
    )


def _why_ungraded(groups: Sequence[Group]) -> str:
    last = groups[-1].episodes[-1]
    if last.score.value is None:
        return f"the last one: {last.outcome}: {last.score.note}"
    return (
        "none of the rewards says what is right (format and overlong only shape; a function does with verifies: true)"
    )


KIND = Kind(config=EvalStage, run=run_eval, check=check_tasks)
