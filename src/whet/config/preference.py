"""The stages that learn from preferences, and their losses: a section with a key for each loss of the sum, and presets.

`loss: dpo` is short for `{preset: dpo}`, which is `{dpo: {}}`; `loss: {dpo: {beta: 0.3}, nll: {weight: 0.5}}` mixes
two. The keys are the losses of `formulas.preference`, and their keys the constants of those functions: adding a loss
there adds it here. A loss by itself is a preset; the others are named sums, and constants other than the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    create_model,
    model_serializer,
    model_validator,
)

from whet.config.budget import StageBudget, answers_of, of_answers, of_rows
from whet.config.data import GeneratedConfig, Source
from whet.config.derived import FromFile, OneOf, section_of
from whet.config.held_out import OtherEvaluation, OwnEvaluation, TrainingStage
from whet.config.model import Reference
from whet.config.presets import SUMS, with_preset
from whet.config.rewards import RewardConfig, check_rewards, verified
from whet.config.strict import Strict
from whet.config.train import SamplingConfig, TrainConfig
from whet.formulas.preference import LOSSES, PairFormula, kto


class Term(Strict):
    """One loss of the sum."""

    weight: float = Field(1.0, gt=0)
    """What its value is multiplied by."""


class OwnTerm(FromFile, Term):
    """A loss of one's own, `(pairs, *, constants) -> loss of each pair` of `formulas.preference.Pairs`."""

    reference: bool = True
    """Whether it compares with a reference."""


def formula_of(name: str, term: Term) -> PairFormula:
    """The loss of a term of pairs, and what must be known of it."""
    return PairFormula(loss=term.function, reference=term.reference) if isinstance(term, OwnTerm) else LOSSES[name]


FUNCTIONS = {**{name: formula.loss for name, formula in LOSSES.items()}, "kto": kto}
TERMS = {name: section_of(function, f"{name}_term", base=Term, module=__name__) for name, function in FUNCTIONS.items()}
PREFERENCE_PRESETS: Mapping[str, Mapping[str, Any]] = {**{name: {name: {}} for name in TERMS}, **SUMS}
"""The named methods, as keys of `LossConfig`."""
IMITATING_LR = 5e-6


class _Losses(Strict):
    """A sum of preference losses, each weighted; no key of a loss that is not in the sum."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PREFERENCE_PRESETS

    preset: Annotated[str, OneOf(PREFERENCE_PRESETS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        """Keys beside a preset replace its own, number by number; `null` takes a loss out of it."""
        return with_preset(data, PREFERENCE_PRESETS)

    @model_validator(mode="after")
    def _check(self) -> _Losses:
        if not self.terms:
            raise ValueError("no loss is left; name a preset (dpo) or give one its section (dpo: {beta: 0.1})")
        if "kto" in self.terms and len(self.terms) > 1:
            raise ValueError("kto is of single answers and the others are of pairs; leave one of them out")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return {name: value for name, value in found.items() if value is not None}

    @property
    def terms(self) -> dict[str, Term]:
        """The losses of the sum by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields if name != "preset"}
        return {name: term for name, term in found.items() if term is not None}

    @property
    def pairs_only(self) -> bool:
        """Whether some loss ranks the step's pairs among themselves, so that a prompt may have one pair only."""
        return bool(self._step_wide)

    @property
    def why_pairs(self) -> str:
        """The complaint about more than two answers."""
        return (
            f"{', '.join(self._step_wide)}: takes a statistic over the step's pairs, one for each prompt; set pairs: "
            "best_worst"
        )

    @property
    def needs_reference(self) -> bool:
        """Whether some loss compares with a reference."""
        return any(name == "kto" or formula_of(name, term).reference for name, term in self.terms.items())

    @property
    def imitates(self) -> bool:
        """Whether it is SFT with a contrast beside it: an NLL, and no reference that it must stay near."""
        return "nll" in self.terms and not self.needs_reference

    @property
    def _step_wide(self) -> list[str]:
        return [name for name in self.terms if name in LOSSES and LOSSES[name].statistic is not None]


if TYPE_CHECKING:

    class LossConfig(_Losses):
        """With a key for each loss."""

        kto: Any = None
        function: Any = None
else:
    LossConfig = create_model(
        "LossConfig",
        __base__=_Losses,
        __doc__=_Losses.__doc__,
        **{name: (term | None, None) for name, term in TERMS.items()},
        function=(SerializeAsAny[OwnTerm] | None, None),
    )


class PreferenceTrainConfig(TrainConfig):
    """The same keys with DPO's default rate: a contrast alone takes the answers apart at that of SFT."""

    lr: float = Field(5e-7, ge=0)
    """With a loss that imitates and has no reference (orpo, cpo, slic) the default is 5e-6 (ORPO's code)."""


def _at_rate_of_loss(train: PreferenceTrainConfig, info: ValidationInfo) -> PreferenceTrainConfig:
    """The section at the default rate of the stage's loss, where the recipe gives none; `loss` is validated before."""
    loss: LossConfig | None = info.data.get("loss")
    if loss is None or not loss.imitates or "lr" in train.model_fields_set:
        return train
    return train.model_copy(update={"lr": IMITATING_LR})


TrainAtRateOfLoss = Annotated[PreferenceTrainConfig, AfterValidator(_at_rate_of_loss), Field(validate_default=True)]
"""The `train` of a stage with a `loss` before it."""


class PreferenceStage(TrainingStage):
    """Learning from comparisons (or, with `loss: kto`, from answers called good or bad), without a reward model."""

    learns_from: ClassVar[str | None] = "pairs"
    kind: Literal["preference"]
    data: Source
    eval_data: Source | None = None
    """Comparisons (or judged answers) that are measured as those of training are (`eval_rewards/accuracies`)."""
    evaluation: OtherEvaluation = None
    loss: LossConfig = LossConfig(preset="dpo")
    pairs: Literal["all", "best_worst"] = "all"
    """Of more than two ranked answers: every pair, or the best against the worst."""
    reference: Reference = None
    """What the loss compares with; None: the model that the stage starts from."""
    max_reference_gap: float | None = Field(None, gt=0)
    """Largest mean |log p - log p_ref| per token before the first update, when the two must be the same model. None:
    0.02 nats in float32, 0.1 in bfloat16."""
    train: TrainAtRateOfLoss = PreferenceTrainConfig()

    @model_validator(mode="after")
    def _check(self) -> PreferenceStage:
        if self.reference is not None and not self.loss.needs_reference:
            raise ValueError("reference has no effect, the loss has none; leave it out")
        for source in (self.data, self.eval_data):
            if not isinstance(source, GeneratedConfig):
                continue
            if source.plain:
                raise ValueError("data.plain is running text and holds no comparisons; remove it")
            if source.answers > 2 and self.pairs == "all" and self.loss.pairs_only:
                raise ValueError(self.loss.why_pairs)
        return self

    def budget(self) -> StageBudget:
        """Rows of two answers, of one for KTO, or of as many as there are."""
        answers = 2 if self.pairs == "best_worst" else answers_of(self.data)
        return of_rows(self.data, self.train, answers=answers if self.loss.kto is None else 1)


class OnlinePreferenceStage(TrainingStage):
    """Sample answers, rank them by their rewards, prefer the best over the worst, and again (online, iterative DPO)."""

    kind: Literal["online_preference"]
    tasks: Source
    rewards: list[RewardConfig] = Field(default_factory=verified, min_length=1)
    loss: LossConfig = LossConfig(preset="dpo")
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Of a prompt's answers: the best against the worst, or every pair of different rewards (one answer of each)."""
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(4, ge=2)
    minibatches: int = Field(1, ge=1)
    """Optimizer steps for one batch of answers."""
    reference: Reference = None
    """What the loss compares with; None: the model that the stage starts from."""
    update_reference_every: int | None = Field(None, ge=1)
    """Steps after which the reference becomes the policy as it is (1: always the iterate before); None: it stays what
    it was."""
    max_reference_gap: float | None = Field(None, gt=0)
    """Largest mean |log p - log p_ref| per token before the first update, when the two must be the same model. None:
    0.02 nats in float32, 0.1 in bfloat16."""
    sampling: SamplingConfig = SamplingConfig()
    evaluation: OwnEvaluation = None
    train: TrainAtRateOfLoss = PreferenceTrainConfig()

    @model_validator(mode="after")
    def _check(self) -> OnlinePreferenceStage:
        check_rewards(self.rewards, max_tokens=self.sampling.max_tokens)
        if self.reference is not None and not self.loss.needs_reference:
            raise ValueError("reference has no effect, the loss has none; leave it out")
        if self.train.steps is None:
            raise ValueError("train.steps must be given where answers are sampled: there is no epoch to end it")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy answers to a prompt are all the same")
        if self.loss.kto is not None:
            raise ValueError("kto is of single answers called good or bad; rewards rank answers: use a loss of pairs")
        if self.loss.pairs_only and self.pairs == "all":
            raise ValueError(self.loss.why_pairs)
        if self.update_reference_every is not None and not self.loss.needs_reference:
            raise ValueError("update_reference_every has no effect, the loss has no reference; leave it out")
        if self.update_reference_every is not None and self.train.lora is not None:
            raise ValueError(
                "update_reference_every cannot update the reference of a LoRA run, which is the model with its "
                "adapter off; set it to null or train all weights"
            )
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"prompts_per_step is {self.prompts_per_step}, too few for minibatches {self.minibatches}: each update "
                "takes whole prompts"
            )
        return self

    def budget(self) -> StageBudget:
        """A batch of answers a step."""
        prompts, answers = self.prompts_per_step, self.rollouts_per_prompt
        return of_answers(self.train.steps, prompts, answers, self.sampling, updates=self.minibatches)
