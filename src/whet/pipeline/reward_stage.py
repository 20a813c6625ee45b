"""The reward model stage: comparisons, judged answers or graded steps through the gate, training, a held-out verdict.

STAGE/model/        a sequence classifier with one label; what its numbers mean stands in its config
STAGE/reward.json   how it judges what it has not seen
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, pstdev

from whet.algorithms.reward_model import comparison, judged, objective_of, reward_model, stepped, weighed
from whet.algorithms.supervised import supervised_steps
from whet.config import GeneratedConfig, ModelConfig, RewardModelStage, Source
from whet.data.faults import Dropped
from whet.errors import DataError
from whet.evals.judgement import Judgement, Labelled, Ranked, judge_labels, judge_rankings
from whet.files import write_json
from whet.models.heads import RewardFacts, note_reward_facts
from whet.pipeline.loop import drive
from whet.pipeline.sources import comparisons, stepwise
from whet.pipeline.sources import judged as judged_rows
from whet.pipeline.stage import Context, World
from whet.records import Atom, Step, seed_of
from whet.tracking.log import RunLog
from whet.training.base import Trainer
from whet.training.compare import Compared, tokenise_comparisons, tokenise_judged
from whet.training.stepwise import tokenise_stepwise

REFERENCES = 512
"""Comparisons whose answers say where zero is, and one."""


def run_reward_model(context: Context) -> None:
    """Train on the rows that pass the gate, then say what the numbers mean and how good they are."""
    config = context.config
    assert isinstance(config, RewardModelStage)
    taught, held_out, described = lessons(context.world, context.model, config)
    context.console.say(f"{context.name}: {described}")
    trainer = context.world.scalar_model(context.model, config.train)
    atoms = [lesson.atom for lesson in taught]
    steps = supervised_steps(len(atoms), config.train)

    def begin(start: int, state: Mapping[str, float]) -> Iterator[Step]:
        steps_of = reward_model(trainer, atoms, config, seed=context.seed, start=start, state=state)
        return with_evaluation(steps_of, trainer, [lesson.atom for lesson in held_out], config, last=steps)

    drive(context, trainer, RunLog(context.folder), begin, steps=steps)
    note_reward_facts(context.folder / "model", _facts(trainer, taught[:REFERENCES], config))
    if held_out:
        found = judgement(trainer, held_out, config)
        write_json(context.folder / "reward.json", asdict(found))
        context.console.say(f"{context.name}: {describe(found)}")


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One example, and what is known of it beside its tokens."""

    atom: Atom
    lengths: tuple[int, ...]
    """Tokens of each of its answers."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that its answers share."""
        return self.atom.rows[0].tokens[: self.atom.rows[0].shared]


def lessons(world: World, model: ModelConfig, config: RewardModelStage) -> tuple[list[Lesson], list[Lesson], str]:
    """(what is taught, what is held out, both in words); nothing but the tokenizer is loaded for it."""
    taught, described = _read(world, model, config, config.data)
    if config.eval_data is not None:
        held_out, other = _read(world, model, config, config.eval_data)
        return taught, held_out, f"{described}; held out: {other}"
    kept = [lesson for lesson in taught if _share(lesson.prompt) >= config.hold_out]
    held_out = [lesson for lesson in taught if _share(lesson.prompt) < config.hold_out]
    if not kept:
        raise DataError("hold_out leaves nothing to train on; lower it, or give eval_data")
    return kept, held_out, f"{described}; {len(held_out):,} of them held out"


def _share(prompt: Sequence[int]) -> float:
    """A number in [0, 1) that a prompt always has."""
    return seed_of("hold out", *prompt) / 2**63


def _read(world: World, model: ModelConfig, config: RewardModelStage, source: Source) -> tuple[list[Lesson], str]:
    template, limit = world.template(model), world.max_length(model)
    max_length = min(config.train.max_length or limit, limit)
    on_bad_row = "error" if isinstance(source, GeneratedConfig) else source.on_bad_row
    if config.learn == "steps":
        graded, unread = stepwise(source)
        rows, dropped = tokenise_stepwise(graded, template, max_length=max_length, on_bad_row=on_bad_row)
        labels = sum(len(row.labels) for row in rows)
        described = f"{len(rows):,} answers, {labels:,} graded steps"
        found = [Lesson(atom=stepped(row), lengths=(len(row.row.tokens) - row.row.shared,)) for row in rows]
    elif config.learn == "outcomes":
        answers, unread = judged_rows(source)
        passed, dropped, stats = tokenise_judged(answers, template, max_length=max_length, on_bad_row=on_bad_row)
        described = stats.describe()
        found = [
            Lesson(atom=judged(each, every_token=config.every_token), lengths=(each.row.trained_count,))
            for each in passed
        ]
    else:
        listed, unread = comparisons(source)
        compared, dropped, stats = tokenise_comparisons(listed, template, max_length=max_length, on_bad_row=on_bad_row)
        described = stats.describe()
        if config.ranking == "plackett_luce":
            _refuse_shades(compared)
        found = [
            Lesson(atom=comparison(each), lengths=tuple(row.trained_count for row in each.atom.rows))
            for each in compared
        ]
    return found, "; ".join([described, *_lost(unread, dropped)])


def _refuse_shades(compared: Sequence[Compared]) -> None:
    """A ranking as one choice knows only the order."""
    shaded = next((each for each in compared if each.margin is not None or each.confidence < 1), None)
    if shaded is not None:
        raise DataError(
            f"{shaded.origin}: has a margin or a confidence, of which ranking: plackett_luce knows nothing; "
            "use ranking: pairs, or leave the columns out"
        )


def _lost(*dropped: Dropped) -> list[str]:
    return [each.describe() for each in dropped if each.total]


# --------------------------------------------------------------------------------------------- measuring


def with_evaluation(
    steps: Iterator[Step], trainer: Trainer, atoms: Sequence[Atom], config: RewardModelStage, *, last: int
) -> Iterator[Step]:
    """The same steps, with `eval_loss` and `eval_accuracy` every so often and at the last one."""
    for step in steps:
        if atoms and (step.index % config.eval_every == 0 or step.index == last):
            found = trainer.evaluate(weighed(atoms, config=config), objective_of(config))
            held_out = {f"eval_{name}": found[name].mean for name in ("loss", "accuracy")}
            step = replace(step, metrics={**step.metrics, **held_out})
        yield step


def judgement(trainer: Trainer, held_out: Sequence[Lesson], config: RewardModelStage) -> Judgement:
    """How the trained model judges what it has not seen."""
    scored = _scores(trainer, held_out)
    if config.learn == "comparisons":
        return judge_rankings(
            [
                Ranked(prompt=lesson.prompt, scores=tuple(last for *_, last in scores), lengths=lesson.lengths)
                for lesson, scores in zip(held_out, scored, strict=True)
            ]
        )
    ends = config.learn == "outcomes"  # an outcome is judged at the answer's end, however many tokens were taught
    return judge_labels(
        [
            Labelled(prompt=lesson.prompt, score=score, label=label)
            for lesson, (scores,) in zip(held_out, scored, strict=True)
            for score, label in list(zip(scores, lesson.atom.rows[0].columns["label"], strict=True))[
                -1 if ends else 0 :
            ]
        ]
    )


def describe(found: Judgement) -> str:
    """`72.4 % of 312 held-out pairs right (95 % interval 68.9 to 75.9), "the longer one" 55.1 %, ...`."""
    rule = "the longer one is better" if found.what == "pairs" else "always the more frequent label"
    at = found.accuracy
    return (
        f"{at.mean:.1%} of {found.count:,} held-out {found.what} right (95 % interval {at.low:.1%} to {at.high:.1%}, "
        f"{at.questions:,} prompts), ties {found.ties:.1%}; {rule!r} has {found.baseline.mean:.1%}; "
        f"calibration error {found.calibration_error:.3f}"
    )


def _facts(trainer: Trainer, references: Sequence[Lesson], config: RewardModelStage) -> RewardFacts:
    """Where the scale of a reward begins, and its unit; labels have theirs already."""
    if config.learn != "comparisons":
        return RewardFacts(reads="steps" if config.learn == "steps" else "answers", link="sigmoid")
    scored = [[last for *_, last in scores] for scores in _scores(trainer, references)]
    spread = pstdev([score for scores in scored for score in scores]) if config.normalise == "unit" else 1.0
    return RewardFacts(mean=fmean(scores[0] for scores in scored), std=spread or 1.0)


def _scores(trainer: Trainer, given: Sequence[Lesson]) -> list[list[tuple[float, ...]]]:
    """For each lesson the scores of each of its rows."""
    found = iter(trainer.scores([row for lesson in given for row in lesson.atom.rows]))
    return [[next(found) for _ in lesson.atom.rows] for lesson in given]
