"""How well a reward model of several objectives rates what it has not seen, objective by objective.

The measure is explained variance: 1 is perfect, 0 is what the mean rating of the training data has, a constant; below 0
it is worse than that. The unit is the prompt, as everywhere in `evals`. Beside it stands how ratings, and the model's
own scores, go with the answers' length: a model may have learnt nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from whet.evals.stats import Interval, explained_variance


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One rating and what the model said. Both in standard deviations from the mean of the training data."""

    prompt: Hashable
    score: float
    rating: float
    length: int
    """Tokens of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveFit:
    """One objective on held-out data."""

    name: str
    count: int
    explained: Interval
    """Share of the variance around the training data's mean; that mean itself has 0."""
    correlation: float | None
    """Of scores with ratings; None where one of the two is constant."""
    length: float | None
    """Correlation of scores with lengths."""
    length_of_ratings: float | None
    """Correlation of the ratings themselves with lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratings:
    """The verdict on a model of several objectives."""

    what: str
    """ratings."""
    count: int
    objectives: tuple[ObjectiveFit, ...]
    """Those of which there is anything to explain among the held-out ratings."""


def judge_ratings(rated: Mapping[str, Sequence[Rating]]) -> Ratings:
    """All held-out ratings, by objective; an objective without ratings, or rated the mean throughout, is left out."""
    found = {name: given for name, given in rated.items() if any(each.rating for each in given)}
    return Ratings(
        what="ratings",
        count=sum(map(len, rated.values())),
        objectives=tuple(_objective(name, given) for name, given in found.items()),
    )


def _objective(name: str, given: Sequence[Rating]) -> ObjectiveFit:
    errors: dict[Hashable, float] = {}
    totals: dict[Hashable, float] = {}
    for each in given:
        errors[each.prompt] = errors.get(each.prompt, 0.0) + (each.rating - each.score) ** 2
        totals[each.prompt] = totals.get(each.prompt, 0.0) + each.rating**2
    scores, ratings = [each.score for each in given], [each.rating for each in given]
    lengths = [float(each.length) for each in given]
    return ObjectiveFit(
        name=name,
        count=len(given),
        explained=explained_variance(list(errors.values()), list(totals.values())),
        correlation=correlation(scores, ratings),
        length=correlation(scores, lengths),
        length_of_ratings=correlation(ratings, lengths),
    )


def correlation(left_N: Sequence[float], right_N: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    left, right = (np.asarray(values) - np.mean(values) for values in (left_N, right_N))
    spread = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / spread if spread > 0 else None
