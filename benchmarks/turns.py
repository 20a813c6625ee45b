"""Episodes of several turns, sampled again: `python -m benchmarks.turns ROWS.jsonl [--episodes N]`, a line a try.

ROWS are demonstrations with calls of tools (`python recipes/agent_hops.py rows` writes some). The demo model is asked
for an answer at each place where they have one, as long as theirs, and goes on with theirs. Tokens of an episode that
were computed in prompts, asked for and sampled, and the CPU seconds of all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from whet.config import DataConfig, ModelConfig
from whet.data.formats import read_conversations
from whet.models.attention import Layout
from whet.models.load import load_model
from whet.records import TokenRow
from whet.sampling.base import Request, SamplingParams, run
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.forward import Plain
from whet.sampling.layouts import Prefill
from whet.templates.jinja import JinjaTemplate
from whet.training.tokenize import tokenise


def answers(row: TokenRow) -> Iterator[slice]:
    """Where its answers stand."""
    at = 0
    for trained, run_ in groupby(row.trained.tolist()):
        length = len(list(run_))
        if trained:
            yield slice(at, at + length)
        at += length


async def play(sampler: EmbeddedSampler, row: TokenRow, number: int) -> None:
    """One episode, turn by turn."""
    places = list(answers(row))
    for turn, place in enumerate(places):
        params = SamplingParams(max_tokens=place.stop - place.start)
        going_on = turn + 1 < len(places)
        seed = 100 * number + turn
        await sampler.sample(Request(prompt=row.tokens[: place.start], seed=seed, params=params, goes_on=going_on))


async def play_all(sampler: EmbeddedSampler, rows: Sequence[TokenRow]) -> None:
    """All of them at once."""
    await asyncio.gather(*(play(sampler, row, number) for number, row in enumerate(rows)))


def main() -> None:
    """Three tries, each with a new sampler."""
    parser = argparse.ArgumentParser(description="time sampling in several turns")
    parser.add_argument("rows")
    parser.add_argument("--episodes", type=int, default=96)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(ModelConfig(path="whet:demo", chat_template="whet:tags"))
    found = read_conversations(DataConfig(path=given.rows, limit=given.episodes))
    kept = tokenise(found, JinjaTemplate(model.tokenizer), loss_on="assistant", max_length=4096, on_bad_row="error")
    rows, computed, hidden = list(kept.rows), [0], Plain.hidden

    def counting(self: Plain, input_N: Tensor, positions_N: Tensor, layout: Layout, *rest: Tensor) -> Tensor:
        if isinstance(layout, Prefill):
            computed[0] += layout.entries[-1].tokens.stop
        return hidden(self, input_N, positions_N, layout, *rest)

    Plain.hidden = counting  # type: ignore[method-assign]
    places = [place for row in rows for place in answers(row)]
    for _ in range(3):
        sampler, computed[0], began = EmbeddedSampler(model, max_running=512), 0, time.process_time()
        run(play_all(sampler, rows))
        per = {
            "asked": sum(place.start for place in places),
            "computed": computed[0],
            "sampled": sum(place.stop - place.start for place in places),
        }
        line = {name: round(tokens / len(rows), 1) for name, tokens in per.items()}
        sys.stdout.write(json.dumps({**line, "cpu_s": round(time.process_time() - began, 3)}) + "\n")


if __name__ == "__main__":
    main()
