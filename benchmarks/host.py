"""What a step of GRPO costs outside the model: microseconds of host work, and bytes kept and sent for each token.

    python -m benchmarks.host [--answers 1024] [--tokens 2048]

Episodes become rows, get log-probabilities (drawn, no model), advantages and weights, are cut, packed and turned into
tensors, as in a step with a KL term and several updates; the model's own work is left out. One thread.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from whet.algorithms.columns import with_advantages, with_logps, with_rewards
from whet.algorithms.groups import drop_nonfinite, to_answers
from whet.algorithms.policy import weigh
from whet.algorithms.state import Setting
from whet.config import PolicyConfig, TrainConfig
from whet.formulas.step import RunningScale
from whet.models.language import pack
from whet.records import Atom, Completion, Ending, Episode, Group, Outcome, Score, TokenRow, Turn, token_ids
from whet.sampling.replica import answer_frame
from whet.sandbox.frames import encode
from whet.training.engine import TokenBudget, as_batch, microbatches
from whet.training.group import cut_atoms

GROUP = 16
PROMPT = 200


class Drawn:
    """A trainer whose log-probabilities are drawn: what is timed is everything around the model."""

    def forward(self, rows: Sequence[TokenRow], *want: str, **_: object) -> dict[str, list[np.ndarray]]:
        """One array per row, as a trainer's pass gives it."""
        draw = np.random.default_rng(0)
        counts = [row.trained_count for row in rows]
        flat_T = draw.standard_normal(sum(counts), dtype=np.float32)
        return {name: np.split(flat_T, np.cumsum(counts)[:-1]) for name in want}


def groups(answers: int, tokens: int) -> list[Group]:
    """Groups of answers of one length to prompts of their own."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(answers // GROUP):
        prompt = token_ids(draw.integers(0, 1000, PROMPT))
        episodes = [_episode(number, sample, prompt, tokens, draw) for sample in range(GROUP)]
        made.append(Group(task=str(number), episodes=tuple(episodes)))
    return made


def _episode(number: int, sample: int, prompt: np.ndarray, tokens: int, draw: np.random.Generator) -> Episode:
    written = Completion(
        tokens=token_ids(draw.integers(0, 1000, tokens)),
        logprobs=draw.standard_normal(tokens, dtype=np.float32),
        version=0,
        ending=Ending.STOP,
    )
    return Episode(
        task=str(number),
        sample=sample,
        seed=sample,
        messages=(),
        turns=(Turn(prompt=prompt, completion=written),),
        score=Score(value=float(draw.random() < 0.5)),
        outcome=Outcome.FINISHED,
    )


def _from_sampler(group: Group) -> int:
    """Bytes of the frames in which a sampler process answers."""
    return sum(len(encode(answer_frame(turn.completion))) for each in group.episodes for turn in each.turns)


def _to_ranks(atoms: Sequence[Atom]) -> int:
    """Bytes of the commands by which two ranks of a trainer get their rows."""
    cut = cut_atoms(atoms, 2, together=False)
    return sum(len(pickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL)) for part in cut.parts)


def main() -> None:
    """Time one step and print a JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = PolicyConfig.model_validate({"minibatches": 2, "kl": {"place": "loss", "coefficient": 0.1}})
    setting = Setting(
        config=config, train=TrainConfig(), steps=1, prompts_per_step=1, temperature=1, max_tokens=asked.tokens,
        max_gap=1, weights={},
    )  # fmt: skip
    played = groups(asked.answers, asked.tokens)
    began = time.process_time()
    answers = to_answers(played, lambda score: score.value or 0.0)
    answers, _ = drop_nonfinite(with_logps(answers, Drawn(), config, temperature=1))  # type: ignore[arg-type]
    answers = with_rewards(answers, config, kl_coefficient=0.1, spread=RunningScale())
    answers, _ = drop_nonfinite(with_advantages(answers, config, weights={}))
    atoms = weigh(answers, setting)
    for micro in microbatches(atoms, TokenBudget(16384), together=False):
        packed = pack(micro, torch.device("cpu"))
        as_batch(micro, packed.input_N.float())
    seconds = time.process_time() - began
    rows = [row for answer in answers for row in answer.rows]
    numbers = sum(values.nbytes for row in rows for values in row.columns.values())
    count, columns = sum(row.trained_count for row in rows), len(rows[0].columns)
    found = {
        "answers": asked.answers,
        "tokens": count,
        "host_us_per_token": round(seconds / count * 1e6, 3),
        "columns": columns,
        "bytes_per_number": round(numbers / count / columns, 2),
        "bytes_per_token_from_sampler": round(sum(map(_from_sampler, played)) / count, 2),
        "bytes_per_token_to_ranks": round(_to_ranks(atoms) / count, 2),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
