"""Credit of turns: a turn of a play against turns like it, or against the point where plays branched.

Legend: N plays of a step, K all their turns, T all their trained tokens, play after play.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isnan, nan
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whet.config import PolicyConfig
from whet.formulas.step import BASELINES, BESIDE_WHOLE, SCALES, TURN_BASELINES, StepAnswers, turns_to_go
from whet.records import Episode, TokenIds, TokenRow, Turn
from whet.training.base import Trainer


class PlayedTurns(NamedTuple):
    """A scored episode of several turns."""

    group: int
    turns: Sequence[Turn]
    rewards: Sequence[float]
    """Of each turn by itself."""

    @property
    def lengths(self) -> list[int]:
        """Sampled tokens of each turn."""
        return [len(turn.completion.tokens) for turn in self.turns]

    @property
    def nodes(self) -> list[bytes]:
        """All tokens up to the end of each turn: equal for plays that are one until then."""
        return [np.concatenate([turn.prompt, turn.completion.tokens]).tobytes() for turn in self.turns]


def from_turns(plays: Sequence[PlayedTurns], reward_T: Tensor, config: PolicyConfig) -> Tensor:
    """Each token's advantage: what its turn brought from there on, against the turns like it, (T,).

    `same_state` and `turn_index` add it to that of the whole play; the latter looks at a turn's own reward alone, and
    at whole plays without the rewards of turns (MT-GRPO 2505.11821).
    """
    length_K = [length for play in plays for length in play.lengths]
    count_N = [len(play.turns) for play in plays]
    reward_K = torch.stack([piece.sum() for piece in torch.split(reward_T, length_K)])
    outcome_N = torch.stack([piece.sum() for piece in torch.split(reward_K, count_N)])
    if config.baseline == "turn_index":
        value_K = reward_T.new_tensor([reward for play in plays for reward in play.rewards])
        outcome_N = outcome_N - torch.stack([piece.sum() for piece in torch.split(value_K, count_N)])
    else:
        value_K = torch.cat([turns_to_go(p, gamma=config.turn_gamma) for p in torch.split(reward_K, count_N)])
    by_state = config.baseline == "same_state"
    alike = [
        (play.group, place if not by_state else (number, place) if turn.state is None else turn.state)
        for number, play in enumerate(plays)
        for place, turn in enumerate(play.turns)
    ]  # a turn without a state is like no other
    turns = _compared(value_K, alike, length_K)
    baseline = (BASELINES | TURN_BASELINES)[config.baseline]
    advantage_T = SCALES[config.scale](turns.per_token(value_K - baseline(turns)), turns)
    if config.baseline not in BESIDE_WHOLE:
        return advantage_T
    whole = _compared(outcome_N, [play.group for play in plays], [sum(play.lengths) for play in plays])
    of_plays_T = SCALES[config.scale](whole.per_token(outcome_N - BASELINES["group_mean"](whole)), whole)
    return of_plays_T + config.turn_weight * advantage_T


def from_tree(plays: Sequence[PlayedTurns], reward_T: Tensor, config: PolicyConfig) -> Tensor:
    """Each token's advantage: the value after its turn less the value before it, (T,).

    A value is the mean reward of the prompt's plays that are one until there (SPO 2505.23564, TreeRPO 2506.05183: the
    mean of a node's leaves); the scale is of whole plays.
    """
    length_N = [sum(play.lengths) for play in plays]
    reward_N = torch.stack([piece.sum() for piece in torch.split(reward_T, length_N)])
    paths = [[(play.group, b""), *((play.group, node) for node in play.nodes)] for play in plays]
    leaves: dict[tuple[int, bytes], list[int]] = {}
    for number, path in enumerate(paths):
        for node in path:
            leaves.setdefault(node, []).append(number)
    # From the first one on: the mean of equal rewards is then exactly that, and what follows from them exactly 0.
    value = {node: reward_N[at[0]] + (reward_N[at] - reward_N[at[0]]).mean() for node, at in leaves.items()}
    gained_K = torch.stack([value[node] - value[before] for path in paths for before, node in pairwise(path)])
    whole = _compared(reward_N, [play.group for play in plays], length_N)
    length_K = torch.tensor([length for play in plays for length in play.lengths])
    return SCALES[config.scale](gained_K.repeat_interleave(length_K), whole)


def first_time(plays: Sequence[PlayedTurns]) -> list[np.ndarray]:
    """For each play, which of its sampled tokens no play before it has: those of turns that it does not share."""
    seen: set[tuple[int, bytes]] = set()
    kept = []
    for play in plays:
        nodes = [(play.group, node) for node in play.nodes]
        kept.append(np.repeat([node not in seen for node in nodes], play.lengths))
        seen.update(nodes)
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much likelier the right answer became with each turn (IGPO 2510.14967, eq. 3 and 4)."""

    golds: Mapping[str, tuple[TokenIds, TokenIds]]
    """Of each task by its identity: what introduces the answer, and the answer."""
    weight: float
    max_length: int

    def of(self, episodes: Sequence[Episode], trainer: Trainer) -> list[list[float]]:
        """The probability of the answer at the beginning of each turn, by the policy as it is now.

        It is exp(mean of its tokens' log p). NaN where prompt and answer are longer than the model attends to.
        """
        rows: dict[bytes, TokenRow] = {}
        places: list[list[bytes]] = []
        for episode in episodes:
            before, gold = self.golds[episode.task]
            tokens = [np.concatenate([turn.prompt, before, gold]) for turn in episode.turns]
            places.append([each.tobytes() for each in tokens])
            for each in tokens:
                trained = np.arange(len(each)) >= len(each) - len(gold)
                if len(each) <= self.max_length:
                    rows.setdefault(each.tobytes(), TokenRow(tokens=each, trained=trained))
        said = trainer.forward(list(rows.values()), "logp")["logp"] if rows else []
        known = {name: exp(float(np.mean(logp))) for name, logp in zip(rows, said, strict=True)}
        return [[known.get(name, nan) for name in names] for names in places]

    def rewards(self, chances: Sequence[float]) -> tuple[float, ...]:
        """What each turn but the last adds to the probability, weighed; 0 where it is not known."""
        gained = [after - before for before, after in pairwise(chances)]
        return tuple(0.0 if isnan(value) else self.weight * value for value in gained)


def _compared(value_N: Tensor, alike: Sequence[object], length_N: Sequence[int]) -> StepAnswers:
    """Values that are compared with those that are alike."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(alike))}
    return StepAnswers(
        reward_N=value_N,
        group_N=torch.tensor([numbers[key] for key in alike]),
        length_N=torch.tensor(length_N),
        greedy_N=torch.full_like(value_N, nan),
    )
