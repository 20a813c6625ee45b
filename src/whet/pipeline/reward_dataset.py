"""What a reward model is taught and judged on: rows of any kind through the gate, one `RewardExample` for each.

Prompts are held out whole, by a hash of their tokens, so that no answer to a held-out prompt is ever trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from statistics import fmean, pstdev

from whet.algorithms.reward_model import comparison, judged, rated, scaled, stepped
from whet.config import ModelConfig, RewardModelStage, Source
from whet.data.base import Comparison, Rated
from whet.data.faults import Dropped, nearest
from whet.errors import DataError
from whet.models.heads import Scale
from whet.pipeline import load_data
from whet.pipeline.gate import row_limit
from whet.pipeline.stage import World
from whet.records import Atom, seed_of
from whet.training.answers import Example, Tokenised, compared_stats, judged_stats, tokenise_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardExample:
    """One example, and what is known of it beside its tokens."""

    atom: Atom
    lengths: tuple[int, ...]
    """Tokens of each of its answers."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that its answers share."""
        return tuple(self.atom.rows[0].tokens[: self.atom.rows[0].shared].tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardDataset:
    """All rows of a stage."""

    taught: Sequence[RewardExample]
    held_out: Sequence[RewardExample]
    described: str
    """Both in words."""
    lost: Mapping[str, Sequence[Dropped]]
    """What was left out, by the key of its source."""
    scales: Mapping[str, Scale] = field(default_factory=dict)
    """What the ratings that are taught are like, by objective; those of all atoms are in these units."""


def reward_dataset(world: World, model: ModelConfig, config: RewardModelStage) -> RewardDataset:
    """Everything through the gate; nothing but the tokenizer is loaded for it. Raises `DataError`."""
    taught, described, dropped = _read(world, model, config, config.data)
    lost = {"data": dropped}
    if config.eval_data is not None:
        held_out, other, lost["eval_data"] = _read(world, model, config, config.eval_data)
        described += f"; held out: {other}"
    else:
        held_out = [lesson for lesson in taught if _share(lesson.prompt) < config.hold_out]
        taught = [lesson for lesson in taught if _share(lesson.prompt) >= config.hold_out]
        described += f"; {len(held_out):,} of them held out"
    if not taught:
        raise DataError("hold_out leaves nothing to train on; lower it, or give eval_data")
    scales = {name: _scale(taught, name) for name in config.objectives}
    if scales:
        taught, held_out = (
            [replace(lesson, atom=scaled(lesson.atom, scales)) for lesson in given] for given in (taught, held_out)
        )
    return RewardDataset(taught=taught, held_out=held_out, described=described, lost=lost, scales=scales)


def ratings_of(lesson: RewardExample, name: str) -> float:
    """The rating of its answer by this objective; NaN: none."""
    return float(lesson.atom.rows[0].columns[f"rating/{name}"].item())


def _scale(taught: Sequence[RewardExample], name: str) -> Scale:
    ratings = [rating for lesson in taught if isfinite(rating := ratings_of(lesson, name))]
    if not ratings:
        raise DataError(f"objectives: no row that is trained on is rated by {name}; leave it out")
    if not (spread := pstdev(ratings)):
        raise DataError(f"objectives: every row is rated {ratings[0]:g} by {name}, which teaches nothing; leave it out")
    return Scale(fmean(ratings), spread)


def _share(prompt: Sequence[int]) -> float:
    """A number in [0, 1) that a prompt always has."""
    return seed_of("hold out", *prompt) / 2**63


def _read(
    world: World, model: ModelConfig, config: RewardModelStage, source: Source
) -> tuple[list[RewardExample], str, Sequence[Dropped]]:
    max_length = row_limit(world, model, config.train)
    template = world.template(model)
    on_bad_row = source.on_bad_row
    if config.learn == "steps":
        graded, unread = load_data.stepwise(source)
        cut, dropped = tokenise_answers(graded, template, max_length=max_length, on_bad_row=on_bad_row)
        rows = [each.atom.rows[0] for each in cut]
        described = f"{len(rows):,} answers, {sum(row.trained_count for row in rows):,} graded steps"
        lengths = [(len(row.tokens) - row.shared,) for row in rows]
        found = [RewardExample(atom=stepped(each), lengths=n) for each, n in zip(cut, lengths, strict=True)]
    elif config.learn == "ratings":
        scored, unread = load_data.rated(source, config.objectives)
        told, dropped = tokenise_answers(scored, template, max_length=max_length, on_bad_row=on_bad_row)
        described = f"{len(told):,} answers, {sum(len(each.source.ratings) for each in told):,} ratings"
        if others := dict.fromkeys(name for each in scored for name in each.unread):
            _refuse_unknown(config.objectives, scored, list(others))
            described += f", those by {', '.join(others)} left unread"
        found = _examples(told, partial(rated, objectives=config.objectives))
    elif config.learn == "outcomes":
        answers, unread = load_data.judged(source)
        passed, dropped = tokenise_answers(answers, template, max_length=max_length, on_bad_row=on_bad_row)
        described = judged_stats(passed, answers).describe()
        found = _examples(passed, partial(judged, every_token=config.every_token))
    else:
        listed, unread = load_data.comparisons(source)
        compared, dropped = tokenise_answers(listed, template, max_length=max_length, on_bad_row=on_bad_row)
        described = compared_stats(compared, listed).describe()
        if config.ranking == "plackett_luce":
            _refuse_shades(compared)
        found = _examples(compared, comparison)
    lost = (unread, dropped)
    return found, "; ".join([described, *(each.describe() for each in lost if each.any)]), lost


def _examples(passed: Sequence[Tokenised[Example]], read: Callable[[Tokenised[Example]], Atom]) -> list[RewardExample]:
    """Each as it is read, with the lengths of its answers."""
    return [
        RewardExample(atom=read(each), lengths=tuple(row.trained_count for row in each.atom.rows)) for each in passed
    ]


def _refuse_unknown(objectives: Sequence[str], scored: Sequence[Rated], others: Sequence[str]) -> None:
    """An objective that no row has, where rows have others, is a misspelled one."""
    known = {name for each in scored for name in each.ratings}
    if unknown := next((name for name in objectives if name not in known), None):
        raise DataError(f"objectives: no row is rated by {unknown!r}; {nearest(unknown, others)}")


def _refuse_shades(compared: Sequence[Tokenised[Comparison]]) -> None:
    """A ranking as one choice knows only the order."""
    sources = (each.source for each in compared)
    shaded = next((each for each in sources if each.margin is not None or each.confidence < 1), None)
    if shaded is not None:
        raise DataError(
            f"{shaded.origin}: has a margin or a confidence, of which ranking: plackett_luce knows nothing; "
            "use ranking: pairs, or leave the columns out"
        )
