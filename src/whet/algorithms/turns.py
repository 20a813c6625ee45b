"""Credit of turns: a turn of a play against turns like it, or against the point where plays branched.

Legend: N answers of a step, each a play; K all their turns, T all their trained tokens, answer after answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isnan, nan

import numpy as np
import torch
from torch import Tensor

from whet.algorithms.groups import Answer
from whet.config import PolicyConfig
from whet.formulas.step import BASELINES, BESIDE_WHOLE, SCALES, TURN_BASELINES, StepAnswers, turns_to_go
from whet.records import Episode, TokenIds, TokenRow
from whet.training.base import Trainer


def from_turns(answers: Sequence[Answer], reward_T: Tensor, config: PolicyConfig) -> Tensor:
    """Each token's advantage: what its turn brought from there on, against the turns like it, (T,).

    `same_state` and `turn_index` add it to that of the whole play; the latter looks at a turn's own reward alone, and
    at whole plays without the rewards of turns (MT-GRPO 2505.11821).
    """
    length_K = [length for answer in answers for length in answer.turn_lengths]
    count_N = [len(answer.turn_lengths) for answer in answers]
    reward_K = torch.stack([piece.sum() for piece in torch.split(reward_T, length_K)])
    outcome_N = torch.stack([piece.sum() for piece in torch.split(reward_K, count_N)])
    if config.baseline == "turn_index":
        value_K = reward_T.new_tensor([reward for answer in answers for reward in answer.turn_rewards])
        outcome_N = outcome_N - torch.stack([piece.sum() for piece in torch.split(value_K, count_N)])
    else:
        value_K = torch.cat([turns_to_go(p, gamma=config.turn_gamma) for p in torch.split(reward_K, count_N)])
    by_state = config.baseline == "same_state"
    alike = [
        (answer.group, place if not by_state else (number, place) if turn.state is None else turn.state)
        for number, answer in enumerate(answers)
        for place, turn in enumerate(answer.episode.turns)
    ]  # a turn without a state is like no other
    turns = _compared(value_K, alike, length_K)
    baseline = (BASELINES | TURN_BASELINES)[config.baseline]
    advantage_T = SCALES[config.scale](turns.per_token(value_K - baseline(turns)), turns)
    if config.baseline not in BESIDE_WHOLE:
        return advantage_T
    whole = _compared(outcome_N, [answer.group for answer in answers], [answer.length for answer in answers])
    of_plays_T = SCALES[config.scale](whole.per_token(outcome_N - BASELINES["group_mean"](whole)), whole)
    return of_plays_T + config.turn_weight * advantage_T


def from_tree(answers: Sequence[Answer], reward_T: Tensor, config: PolicyConfig) -> Tensor:
    """Each token's advantage: the value after its turn less the value before it, (T,).

    A value is the mean reward of the prompt's plays that are one until there (SPO 2505.23564, TreeRPO 2506.05183: the
    mean of a node's leaves); the scale is of whole plays.
    """
    length_N = [answer.length for answer in answers]
    reward_N = torch.stack([piece.sum() for piece in torch.split(reward_T, length_N)])
    paths = [[(answer.group, b""), *_nodes(answer)] for answer in answers]
    leaves: dict[tuple[int, bytes], list[int]] = {}
    for number, path in enumerate(paths):
        for node in path:
            leaves.setdefault(node, []).append(number)
    # From the first one on: the mean of equal rewards is then exactly that, and what follows from them exactly 0.
    value = {node: reward_N[at[0]] + (reward_N[at] - reward_N[at[0]]).mean() for node, at in leaves.items()}
    gained_K = torch.stack([value[node] - value[before] for path in paths for before, node in pairwise(path)])
    whole = _compared(reward_N, [answer.group for answer in answers], length_N)
    length_K = torch.tensor([length for answer in answers for length in answer.turn_lengths])
    return SCALES[config.scale](gained_K.repeat_interleave(length_K), whole)


def first_time(answers: Sequence[Answer]) -> list[np.ndarray]:
    """Of each answer, which of its sampled tokens no answer before it has: those of turns that it does not share."""
    seen: set[tuple[int, bytes]] = set()
    kept = []
    for answer in answers:
        nodes = _nodes(answer)
        kept.append(np.repeat([node not in seen for node in nodes], answer.turn_lengths))
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


def _nodes(answer: Answer) -> list[tuple[int, bytes]]:
    """Group and all tokens up to the end of each turn: equal for plays that are one until then."""
    turns = answer.episode.turns
    return [(answer.group, np.concatenate([t.prompt, t.completion.tokens]).tobytes()) for t in turns]


def _compared(value_N: Tensor, alike: Sequence[object], length_N: Sequence[int]) -> StepAnswers:
    """Values that are compared with those that are alike."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(alike))}
    return StepAnswers(
        reward_N=value_N,
        group_N=torch.tensor([numbers[key] for key in alike]),
        length_N=torch.tensor(length_N),
        greedy_N=torch.full_like(value_N, nan),
    )
