"""What a recipe will cost, in prompts, sequences, tokens and optimizer steps, before anything is loaded.

All numbers are upper bounds: an answer may stop early, a row may be short, a batch that teaches nothing is not
trained on. What depends on something that only the run will read (the number of rows, the model's limit) is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from whet.config.data import DataConfig, GeneratedConfig, listed
from whet.config.feedback import AgreementStage, CompareStage, QuestionsStage, ReviseStage, RowsBase, StepLabelsStage
from whet.config.online_preference import OnlinePreferenceStage
from whet.config.preference import PreferenceStage
from whet.config.recipe import Recipe, RLStage, SFTStage, Stage
from whet.config.reward_model import RewardModelStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One stage's arithmetic. None: not known before the run."""

    stage: str
    kind: str
    steps: int | None
    """Steps as the log counts them; an evaluation is one step."""
    optimizer_steps: int | None
    prompts: int | None
    """Prompts of one step; rows, where there is nothing to sample."""
    sequences: int | None
    """Sequences that one step samples (RL, eval) or trains on."""
    tokens_each: int | None
    """Most tokens of a sequence: sampled ones (RL, eval), all of them (SFT)."""
    rounds: int = 1
    """How many times dynamic sampling may draw a step's prompts."""

    @property
    def tokens(self) -> int | None:
        """Most tokens of one step that is not drawn again."""
        return times(self.sequences, self.tokens_each)

    @property
    def all_prompts(self) -> int | None:
        """Most prompts of the stage."""
        return times(self.prompts, self.steps, self.rounds)

    @property
    def all_sequences(self) -> int | None:
        """Most sequences of the stage."""
        return times(self.sequences, self.steps, self.rounds)

    @property
    def all_tokens(self) -> int | None:
        """Most tokens of the stage."""
        return times(self.tokens, self.steps, self.rounds)


def budgets(recipe: Recipe) -> list[Budget]:
    """The arithmetic of every stage, in order."""
    return [_budget(name, stage) for name, stage in recipe.stages.items()]


def times(*factors: int | None) -> int | None:
    """The product, unknown if a factor is."""
    product = 1
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product


def _budget(name: str, stage: Stage) -> Budget:
    if isinstance(stage, SFTStage | PreferenceStage | RewardModelStage):
        counts, train = [_rows(source) for source in listed(stage.data)], stage.train
        rows = sum(filter(None, counts)) if None not in counts else None
        steps = train.steps
        if steps is None and rows is not None:
            steps = max(1, -(-int(rows * train.epochs) // train.batch_size))
        return Budget(
            stage=name,
            kind=stage.kind,
            steps=steps,
            optimizer_steps=steps,
            prompts=train.batch_size,
            sequences=times(train.batch_size, _answers(stage)),
            tokens_each=train.max_length,
        )
    if isinstance(stage, OnlinePreferenceStage):
        return Budget(
            stage=name,
            kind=stage.kind,
            steps=stage.train.steps,
            optimizer_steps=times(stage.train.steps, stage.minibatches),
            prompts=stage.prompts_per_step,
            sequences=stage.prompts_per_step * stage.rollouts_per_prompt,
            tokens_each=stage.sampling.max_tokens,
        )
    if isinstance(stage, RLStage):
        dynamic = stage.algorithm.dynamic_sampling
        return Budget(
            stage=name,
            kind=stage.kind,
            steps=stage.train.steps,
            optimizer_steps=times(stage.train.steps, stage.algorithm.minibatches),
            prompts=stage.prompts_per_step,
            sequences=stage.prompts_per_step * stage.rollouts_per_prompt,
            tokens_each=stage.sampling.max_tokens,
            rounds=dynamic.rounds if dynamic else 1,
        )
    if isinstance(stage, RowsBase):
        return _making_rows(name, stage)
    rows = _rows(stage.tasks)
    return Budget(
        stage=name,
        kind=stage.kind,
        steps=1,
        optimizer_steps=0,
        prompts=rows,
        sequences=times(rows, stage.samples, max(1, len(stage.models))),
        tokens_each=stage.sampling.max_tokens,
    )


def _making_rows(
    name: str, stage: CompareStage | ReviseStage | QuestionsStage | AgreementStage | StepLabelsStage
) -> Budget:
    """A stage that makes rows: a step is a chunk of tasks. What a judge reads and writes elsewhere is not counted."""
    rows = _rows(stage.data if isinstance(stage, QuestionsStage | AgreementStage) else stage.tasks)
    each, tokens = 0, 0
    if isinstance(stage, CompareStage):
        each, tokens = stage.samples, stage.sampling.max_tokens
    if isinstance(stage, ReviseStage):
        own = 1 if stage.writer is not None else 1 + 2 * stage.rounds
        each, tokens = own, stage.max_tokens
    prompts = stage.chunk if rows is None else min(stage.chunk, rows)
    unknown = isinstance(stage, StepLabelsStage)  # `rollouts` for each step, whose number nobody knows before
    return Budget(
        stage=name,
        kind=stage.kind,
        steps=None if rows is None else -(-rows // stage.chunk),
        optimizer_steps=0,
        prompts=prompts,
        sequences=None if unknown else prompts * each,
        tokens_each=stage.sampling.max_tokens if isinstance(stage, StepLabelsStage) else tokens,
    )


def _rows(source: DataConfig | GeneratedConfig) -> int | None:
    return source.count if isinstance(source, GeneratedConfig) else source.limit


def _answers(stage: SFTStage | PreferenceStage | RewardModelStage) -> int | None:
    """Answers of a row: what is compared may come in lists of any length."""
    if isinstance(stage, PreferenceStage):
        if stage.loss.kto is not None:
            return 1
        if stage.pairs == "best_worst":
            return 2
    elif isinstance(stage, SFTStage) or stage.learn != "comparisons":
        return 1
    return stage.data.answers if isinstance(stage.data, GeneratedConfig) else None
