"""Stages that make rows of answers and choose among them: rejection sampling and its relatives (docs/selection.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.budget import ONE_STEP, StageBudget, of_chunks
from whet.config.data import DataConfig, Source, Sources
from whet.config.feedback import RowsBase
from whet.config.judge import ChatConfig
from whet.config.rewards import RewardConfig, check_rewards, judged
from whet.config.stage import StageBase
from whet.config.strict import Made
from whet.config.train import SamplingConfig

Share = Annotated[float, Field(ge=0, le=1)]


class SampleStage(RowsBase):
    """Answers to every task by the policy, by teachers or by both, graded where there are rewards: one row each."""

    kind: Literal["sample"]
    tasks: Source
    samples: int = Field(4, ge=1)
    """Answers of each author to each task."""
    authors: list[Literal["policy"] | ChatConfig] = Field(["policy"], min_length=1)
    """Who answers: `policy`, an endpoint, a model on this machine, a script; each with its own temperature."""
    rewards: list[RewardConfig] = []
    """What grades the answers; none: rows without `reward`."""
    hint: str | None = None
    """Added to the last message for sampling, `{column}` being the task's; rows have the prompt without it (STaR's
    rationalisation)."""
    sampling: SamplingConfig = SamplingConfig()

    @property
    def max_tokens(self) -> int:
        """Most tokens of an answer, a teacher's too."""
        return self.sampling.max_tokens

    @model_validator(mode="after")
    def _check(self) -> SampleStage:
        check_rewards(self.rewards, max_tokens=self.max_tokens)
        if self.samples > 1 and "policy" in self.authors and self.sampling.temperature == 0:
            raise ValueError("samples must be 1 at sampling.temperature 0: greedy answers to one task are all the same")
        return self

    def budget(self) -> StageBudget:
        """Its own samples; what is asked elsewhere is not counted."""
        own = self.samples * self.authors.count("policy")
        return of_chunks(self.tasks, self.chunk, each=own, tokens=self.max_tokens)


class SelectStage(StageBase):
    """The rows worth keeping of what other stages or files hold; each row that is left out is kept with its reason.

    The filters are applied in the order of their keys here, each to what the ones before it left.
    """

    makes: ClassVar[Made | None] = "rows"
    reads_model: ClassVar[bool] = False
    kind: Literal["select"]
    data: DataConfig | Annotated[list[DataConfig], Field(min_length=1)]
    """Rows with a prompt and an answer (tasks alone will do for `write: tasks`), from one source or several."""
    write: Literal["answers", "pairs", "tasks"] = "answers"
    """answers: rows to imitate. pairs: of each prompt the best and the worst. tasks: each prompt once, with its other
    columns and the share of right answers (`solved`)."""
    rewards: list[RewardConfig] = []
    """Grade the answers here; none: by their columns `reward` and `correct`, as a `sample` stage leaves them."""
    decontaminate: Sources | None = None
    """Evaluation sets: rows that share words with one of their prompts are left out."""
    ngram: int = Field(13, ge=1)
    """Words in a row that count as shared; a shorter prompt must be equal as a whole (GPT-3, appendix C)."""
    difficulty: tuple[Share, Share] | None = None
    """The least and the greatest share of right answers to a prompt; others are too hard or too easy."""
    correct: bool | None = None
    """true: right answers alone; false: wrong ones alone. pairs: true asks for a right and a wrong one."""
    min_reward: float | None = None
    """Answers below it are left out."""
    max_similarity: Share | None = 1.0
    """Most that an answer may have in common with one that is kept for its prompt, as the Jaccard index of their
    trigrams of words; 1: only equal answers are left out; null: not even those."""
    best: int | None = Field(None, ge=1)
    """Answers to keep of each prompt, the highest rewards first, equal ones as they came; pairs: how many."""

    @property
    def sources(self) -> list[DataConfig]:
        """Its `data` as a list."""
        return self.data if isinstance(self.data, list) else [self.data]

    @model_validator(mode="after")
    def _check(self) -> SelectStage:
        for reward in self.rewards:
            if reward.counts_tokens:
                raise ValueError(f"rewards: {reward.kind} counts tokens, which rows lack; put it in the sample stage")
        if self.rewards and self.correct is not None and not judged(self.rewards):
            raise ValueError("correct asks which answers are right, and none of the rewards judges that")
        if self.write == "pairs" and (self.correct is False or self.min_reward is not None):
            raise ValueError("write: pairs takes the best and the worst; leave min_reward and correct: false out")
        return self

    def budget(self) -> StageBudget:
        """One step that samples nothing."""
        return ONE_STEP

    def unfit(self, made: Mapping[str, StageBase]) -> Iterator[str]:
        """Its inputs must have grades where they are asked for."""
        asked = (self.best, self.min_reward, self.difficulty, self.correct)
        if self.rewards or (self.write != "pairs" and all(each is None for each in asked)):
            return
        for source in self.sources:
            stage = made.get(source.path)
            if isinstance(stage, SampleStage) and not stage.rewards:
                yield f"data is {source.path}, whose answers are not graded; give rewards here or there"
