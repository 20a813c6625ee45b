"""What a recipe will cost, in prompts, sequences, tokens and optimizer steps, before anything is loaded.

All numbers are upper bounds: an answer may stop early, a row may be short, a batch that teaches nothing is not
trained on. What depends on something that only the run will read (the number of rows, the model's limit) is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from whet.config.data import GeneratedConfig, Source, Sources, listed
from whet.config.train import SamplingConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBudget:
    """One stage's arithmetic. None: not known before the run."""

    stage: str = ""
    kind: str = ""
    steps: int | None = None
    """Steps as the log counts them; an evaluation is one step."""
    optimizer_steps: int | None = None
    prompts: int | None = None
    """Prompts of one step; rows, where there is nothing to sample."""
    sequences: int | None = None
    """Sequences that one step samples (RL, eval) or trains on."""
    tokens_each: int | None = None
    """Most tokens of a sequence: sampled ones (RL, eval), all of them (SFT)."""
    rounds: int = 1
    """How many times dynamic sampling may draw a step's prompts."""
    repeat: int = 1
    """Rounds of the loop that it stands in, at most."""

    @property
    def tokens(self) -> int | None:
        """Most tokens of one step that is not drawn again."""
        return times(self.sequences, self.tokens_each)

    @property
    def all_updates(self) -> int | None:
        """Optimizer steps of all rounds."""
        return times(self.optimizer_steps, self.repeat)

    def total(self, of_a_step: int | None) -> int | None:
        """What so many prompts, sequences or tokens of a step come to at most in the whole stage."""
        return times(of_a_step, self.steps, self.rounds, self.repeat)


ONE_STEP = StageBudget(steps=1, optimizer_steps=0, sequences=0, tokens_each=0)
"""Of a stage that neither trains nor samples."""


def times(*factors: int | None) -> int | None:
    """The product, unknown if a factor is."""
    product = 1
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product


def rows_of(source: Source) -> int | None:
    """Most rows of a source; None where only reading it tells."""
    return source.count if isinstance(source, GeneratedConfig) else source.limit


def answers_of(source: Source) -> int | None:
    """Answers of a row of comparisons, which come in lists of any length."""
    return source.answers if isinstance(source, GeneratedConfig) else None


def of_rows(source: Sources, train: TrainConfig, *, answers: int | None) -> StageBudget:
    """Training on rows of so many answers each."""
    counts, steps = [rows_of(each) for each in listed(source)], train.steps
    rows = sum(filter(None, counts)) if None not in counts else None
    if steps is None and rows is not None:
        steps = max(1, -(-int(rows * train.epochs) // train.batch_size))
    return StageBudget(
        steps=steps,
        optimizer_steps=steps,
        prompts=train.batch_size,
        sequences=times(train.batch_size, answers),
        tokens_each=train.max_length,
    )


def of_answers(
    steps: int | None, prompts: int, answers: int, sampling: SamplingConfig, *, updates: int = 1, rounds: int = 1
) -> StageBudget:
    """Training on so many sampled answers to each prompt: a batch of prompts a step, of so many `updates`."""
    return StageBudget(
        steps=steps,
        optimizer_steps=times(steps, updates),
        prompts=prompts,
        sequences=prompts * answers,
        tokens_each=sampling.max_tokens,
        rounds=rounds,
    )


def of_chunks(source: Source, chunk: int, *, each: int | None, tokens: int) -> StageBudget:
    """Making rows: a step is a chunk of tasks, each with so many sequences of so many tokens at most.

    What a judge reads and writes elsewhere is not counted.
    """
    rows = rows_of(source)
    prompts = chunk if rows is None else min(chunk, rows)
    return StageBudget(
        steps=None if rows is None else -(-rows // chunk),
        optimizer_steps=0,
        prompts=prompts,
        sequences=times(prompts, each),
        tokens_each=tokens,
    )
