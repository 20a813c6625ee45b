"""Stages that make rows rather than models, most of them chunk by chunk.

Comparisons, revisions, questions, labels and verdicts (docs/judges.md); answers, and the choice among them: rejection
sampling and its relatives (docs/selection.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.budget import ONE_STEP, StageBudget, of_chunks
from whet.config.data import DataConfig, Source, Sources
from whet.config.judge import ChatConfig, JudgeConfig, JudgeWording
from whet.config.rewards import RewardConfig, check_rewards, judged
from whet.config.stage import StageBase
from whet.config.strict import Made
from whet.config.train import SamplingConfig

Share = Annotated[float, Field(ge=0, le=1)]


class RowsBase(StageBase):
    """What every stage that makes rows has."""

    makes: ClassVar[Made | None] = "rows"
    chunk: int = Field(32, ge=1)
    """Tasks that are worked on together, and kept together: a killed stage goes on after its last whole chunk, and what
    a judge had answered of the next is not asked again."""


class CompareStage(RowsBase):
    """Sample answers and find out which are better: comparisons for `preference` and `reward_model` stages (RLAIF)."""

    kind: Literal["compare"]
    tasks: Source
    samples: int = Field(2, ge=2)
    """Answers to each task."""
    judge: JudgeConfig | None = None
    """Who compares them, in pairs; or `rewards`."""
    rewards: list[RewardConfig] = []
    """What scores them, in place of a judge: the higher score is better."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Which pairs become rows: the one that is furthest apart, or all that are no ties."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> CompareStage:
        if (self.judge is None) == (not self.rewards):
            raise ValueError("give a judge or rewards, one of the two")
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens)
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy answers to one task are all the same")
        return self

    def budget(self) -> StageBudget:
        """Its samples."""
        return of_chunks(self.tasks, self.chunk, each=self.samples, tokens=self.sampling.max_tokens)


class ReviseStage(RowsBase):
    """Answer, criticise by a principle, rewrite, and again: better answers to imitate (Constitutional AI)."""

    kind: Literal["revise"]
    tasks: Source
    principles: list[str] | Path
    """A list, or a text file with one a line (or a YAML list); one is drawn for each round of each task."""
    rounds: int = Field(1, ge=1)
    """Times that an answer is criticised and rewritten."""
    writer: ChatConfig | None = None
    """Who criticises and rewrites; None: the model that answered."""
    visible: Literal["answer", "everything"] = "answer"
    """answer: what follows a thinking block, in what the writer reads and in what it writes. everything: all of it."""
    temperature: float = Field(1.0, ge=0)
    """Of the first answers."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of an answer, of a critique and of a revision."""

    def budget(self) -> StageBudget:
        """Its answer and, without another writer, the critiques and revisions."""
        own = 1 if self.writer is not None else 1 + 2 * self.rounds
        return of_chunks(self.tasks, self.chunk, each=own, tokens=self.max_tokens)


class ComparisonsStage(RowsBase):
    """What stages have that ask about comparisons, and sample nothing themselves."""

    reads_model: ClassVar[bool] = False
    data: Source
    """Comparisons."""

    def budget(self) -> StageBudget:
        """It samples nothing itself."""
        return of_chunks(self.data, self.chunk, each=0, tokens=0)


class QuestionsStage(ComparisonsStage):
    """Comparisons as questions to a judge, with the known verdict: a judge in training imitates and then reasons.

    A row has `prompt` (the question), `completion` (to imitate) and `verdict` (for `rewards: [{kind: verdict}]`).
    """

    kind: Literal["questions"]
    form: Literal["pairs", "points"] = "pairs"
    """pairs: which is better, in both orders. points: is the best answer good, is the worst (scale yes_no)."""
    wording: JudgeWording = JudgeWording()
    """The questions' wording. Give the trained judge the same keys where it is used."""
    teacher: ChatConfig | None = None
    """Who writes reasons to imitate; only those whose verdict is the known one become rows. None: the verdict alone."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of what the teacher writes."""

    @model_validator(mode="after")
    def _check(self) -> QuestionsStage:
        if self.form == "points" and self.wording.scale != "yes_no":
            raise ValueError("wording.scale must be yes_no for form: points; comparisons say better or worse, no score")
        return self


class AgreementStage(ComparisonsStage):
    """How often a judge says what is known: its verdicts on comparisons that people (or a rule) have decided.

    Its rows are to be looked at, and no later stage reads them.
    """

    makes: ClassVar[Made | None] = None
    kind: Literal["agreement"]
    judge: JudgeConfig


class StepLabelsStage(RowsBase):
    """Grade the steps of the policy's own answers by where they lead: rows for `learn: steps` (Math-Shepherd).

    From the end of each step `rollouts` answers are finished; the step is right if any of them is (hard), or as far as
    they are (soft). The last step has the answer's own verdict; what follows a step that leads nowhere has no label.
    """

    kind: Literal["step_labels"]
    tasks: Source
    rewards: list[RewardConfig] = Field(min_length=1)
    """One of them must say which answers are right."""
    samples: int = Field(4, ge=1)
    """Answers to each task whose steps are graded."""
    rollouts: int = Field(8, ge=1)
    """Completions of each step's prefix."""
    labels: Literal["hard", "soft"] = "hard"
    separator: str = Field("\n", min_length=1)
    """Ends a step; give the `process_model` reward the same."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> StepLabelsStage:
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens)
        if not judged(self.rewards):
            raise ValueError("rewards: none says which answers are right; add one that does (verifier, math, exact)")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy completions of one prefix are all the same")
        return self

    def budget(self) -> StageBudget:
        """`rollouts` for each step, whose number is not known before."""
        return of_chunks(self.tasks, self.chunk, each=None, tokens=self.sampling.max_tokens)


class SampleStage(RowsBase):
    """Answers to every task by the policy, by teachers or by both, graded where there are rewards: one row each."""

    kind: Literal["sample"]
    tasks: Source
    samples: int = Field(4, ge=1)
    """Answers of each author to each task."""
    authors: list[Literal["policy"] | ChatConfig] = Field(["policy"], min_length=1)
    """The models that answer: `policy`, an endpoint, a local model, a script; each with its own temperature."""
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
