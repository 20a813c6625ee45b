"""The preference stage: data gate, the reference's log-probabilities, training, evaluation, model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from whet.algorithms.preference import beside_mismatched, objective_of, preference, weigh_preferences
from whet.algorithms.sequence_sums import add_constant
from whet.algorithms.supervised import largest_step, supervised_steps
from whet.config import LossConfig, ModelConfig, PreferenceStage, SamplingConfig, Source, TrainConfig
from whet.data.base import Comparison, Judged
from whet.data.faults import Dropped
from whet.errors import DataError
from whet.pipeline.gate import row_limit
from whet.pipeline.held_out import Measure, of_rows, of_tasks, sampling_of
from whet.pipeline.load_data import comparisons, judged
from whet.pipeline.playing import SHOWN, evaluation_summary
from whet.pipeline.reference import largest_gap, with_reference
from whet.pipeline.runner import drive
from whet.pipeline.stage import Context, Kind, Policy, Seen, World, keep_dropped, reference_of
from whet.records import Atom, Metric
from whet.tracking.charts import PREFERENCES, TRAINING, Look
from whet.tracking.log import RunLog
from whet.tracking.text import number, percent
from whet.training.answers import PreferenceStats, Tokenised, compared_stats, judged_stats, tokenise_answers
from whet.training.base import Trainer
from whet.training.engine import most_uncut


def run_preference(context: Context[PreferenceStage]) -> None:
    """Train on the comparisons, or the judged answers, that pass the gate."""
    config = context.config
    found = {"train": gate_preferences(context.world, context.model, config, config.data)}
    context.console.say(f"{context.name}: {found['train'].describe()}")
    keep_dropped(context, "data", found["train"].lost)
    if config.eval_data is not None:
        found["eval"] = gate_preferences(context.world, context.model, config, config.eval_data)
        context.console.say(f"{context.name}: for evaluation {found['eval'].describe()}")
        keep_dropped(context, "eval_data", found["eval"].lost)
    with of_tasks(context) as measuring:
        _train(context, found, measuring)


def _train(
    context: Context[PreferenceStage],
    found: Mapping[str, GatedPreferences],
    measuring: Callable[[Policy], list[Measure]],
) -> None:
    config = context.config
    examples: Mapping[str, Sequence[Atom]] = {name: gated.atoms for name, gated in found.items()}
    if config.reference is not None:
        examples = _referred(context, examples, cache(lambda: _reference(context)))
    policy = context.world.policy(context.model, config.train, sampling_of(config.evaluation))
    trainer = policy.trainer
    if config.reference is None and config.loss.needs_reference:
        examples = _referred(context, examples, lambda: trainer)
    steps = supervised_steps(len(examples["train"]), config.train)

    def measure() -> Mapping[str, Metric]:
        weighed = weigh_preferences(examples["eval"], loss=config.loss, trainer=trainer)
        return trainer.evaluate(weighed, objective_of(config.loss))

    given = (trainer, examples["train"], config.loss, config.train)
    begin = partial(preference, *given, seed=context.seed, max_gap=largest_gap(config, policy))
    measures = [*([of_rows(measure)] if "eval" in examples else []), *measuring(policy)]
    drive(context, trainer, RunLog(context.folder), begin, steps=steps, measures=measures)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedPreferences:
    """What the two doors of the gate let through: reading the rows, and tokenizing them."""

    atoms: Sequence[Atom]
    stats: PreferenceStats
    lost: tuple[Dropped, ...]
    warning: str = ""

    def describe(self) -> str:
        """`500 comparisons of 1,000 answers, ...; 2 rows dropped: ...`."""
        dropped = (dropped.describe() for dropped in self.lost if dropped.any)
        return "; ".join([self.stats.describe(), *dropped, *filter(None, [self.warning])])


def gate_preferences(world: World, model: ModelConfig, config: PreferenceStage, source: Source) -> GatedPreferences:
    """Rows, tokenised and checked; nothing but the tokenizer is loaded for it."""
    length, on_bad_row = row_limit(world, model, config.train), source.on_bad_row
    template = world.template(model)
    if config.loss.kto is not None:
        answers, unread = judged(source)
        passed, dropped = tokenise_answers(answers, template, max_length=length, on_bad_row=on_bad_row)
        return GatedPreferences(
            atoms=beside_mismatched(passed, length),
            stats=judged_stats(passed, answers),
            lost=(unread, dropped),
            warning=_imbalance(passed, config.loss),
        )
    rows, unread = comparisons(source)
    compared, dropped = tokenise_answers(rows, template, max_length=length, on_bad_row=on_bad_row)
    stats = compared_stats(compared, rows)
    if config.pairs == "best_worst":
        compared = [replace(each, atom=Atom(rows=(each.atom.rows[0], each.atom.rows[-1]))) for each in compared]
    longer = next((each for each in compared if len(each.atom.rows) > 2), None)
    if longer is not None and config.loss.pairs_only:
        raise DataError(f"{longer.source.origin}: {len(longer.atom.rows)} answers; {config.loss.why_pairs}")
    return GatedPreferences(atoms=_with_confidence(compared), stats=stats, lost=(unread, dropped))


def _referred(
    context: Context, found: Mapping[str, Sequence[Atom]], trainer: Callable[[], Trainer]
) -> dict[str, Sequence[Atom]]:
    return {name: with_reference(context, trainer, atoms, name) for name, atoms in found.items()}


def _reference(context: Context[PreferenceStage]) -> Trainer:
    """The other model that the loss compares with."""
    model = reference_of(context.model, context.config.reference)
    train = TrainConfig(microbatch_tokens=context.config.train.microbatch_tokens)
    return context.world.policy(model, train, SamplingConfig(), reads=context.model).trainer


def _with_confidence(compared: Sequence[Tokenised[Comparison]]) -> list[Atom]:
    """The atoms, with the column `confidence` where some label is soft."""
    if all(each.source.confidence == 1 for each in compared):
        return [each.atom for each in compared]
    return [add_constant(each.atom, "confidence", each.source.confidence) for each in compared]


def _imbalance(passed: Sequence[Tokenised[Judged]], loss: LossConfig) -> str:
    """KTO's own advice (2402.01306, section 4.2): the good and the bad should pull about equally."""
    assert loss.kto is not None
    good = sum(each.source.good for each in passed)
    bad = len(passed) - good
    if not (good and bad):
        only = "good" if good else "bad"
        return f"all {len(passed):,} answers are {only}, and KTO learns from the difference; add others"
    pull = loss.kto.desirable * good, loss.kto.undesirable * bad
    if 1 <= pull[0] / pull[1] <= 1.5:
        return ""
    return (
        f"{good:,} good and {bad:,} bad answers pull with {pull[0]:g} to {pull[1]:g}, outside KTO's 1 to 1.5; "
        "loss.kto.desirable and undesirable set that right"
    )


def check_preference(context: Context[PreferenceStage]) -> Seen:
    """Both sets of rows through the gate."""
    config, world, model = context.config, context.world, context.model
    gated = gate_preferences(world, model, config, config.data)
    summary = gated.describe()
    if config.eval_data is not None:
        summary += f"; for evaluation {gate_preferences(world, model, config, config.eval_data).describe()}"
    summary = "; ".join([summary, *evaluation_summary(context)])
    compares, atoms = objective_of(config.loss).compares, gated.atoms
    taught = atoms if compares else [Atom(rows=atom.rows[:1]) for atom in atoms]  # without the mismatched answer
    shown, uncut = [row for atom in taught[:SHOWN] for row in atom.rows[:2]], most_uncut(taught, together=compares)
    largest = largest_step([atom.cost for atom in taught], config.train, context.seed)
    return Seen(summary=summary, rows=shown, step_tokens=largest, uncut_tokens=uncut)


KIND = Kind(
    config=PreferenceStage,
    run=run_preference,
    check=check_preference,
    look=Look(
        charts=(*PREFERENCES, *TRAINING),
        headline=(
            ("eval_rewards/accuracies", "the share of held-out pairs in the right order", percent),
            ("rewards/accuracies", "the share of pairs in the right order", percent),
            ("loss", "the loss", number),
        ),
    ),
)
