"""The preference losses of a recipe: a section with one key for each loss that is in the sum, and presets.

`loss: dpo` is short for `{preset: dpo}`, which is `{dpo: {}}`; `loss: {dpo: {beta: 0.3}, nll: {weight: 0.5}}` mixes
two. A preset is data: the losses of a named method with its published numbers. `formulas.preference` holds the
functions that the keys stand for, and a law in the tests holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from whet.config.budget import Budget, answers_of, of_rows
from whet.config.data import GeneratedConfig, Source
from whet.config.presets import with_preset
from whet.config.stage import StageBase
from whet.config.strict import Made, Strict
from whet.config.train import TrainConfig


class Term(Strict):
    """One loss of the sum."""

    weight: float = Field(1.0, gt=0)
    """What its value is multiplied by."""


class BetaTerm(Term):
    """A loss with a strength: how far the policy may go from the reference, or how sharp the contrast is."""

    beta: float = Field(0.1, gt=0)


class SmoothTerm(BetaTerm):
    """A loss that may doubt its labels."""

    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels that are taken to be the wrong way round."""


class RobustTerm(BetaTerm):
    """Robust DPO."""

    smoothing: float = Field(0.1, gt=0, lt=0.5)


class IPOTerm(BetaTerm):
    """IPO; beta is the paper's tau."""

    average: bool = True
    """Means over tokens (as the authors say it is meant) or sums (as the paper prints it)."""


class NormTerm(SmoothTerm):
    """DPO of means over tokens."""

    beta: float = Field(5.0, gt=0)


class EXOTerm(BetaTerm):
    """EXO."""

    smoothing: float = Field(1e-3, gt=0, lt=0.5)


class DiscoPOPTerm(BetaTerm):
    """DiscoPOP."""

    beta: float = Field(0.05, gt=0)
    tau: float = Field(0.05, gt=0)


class FDPOTerm(BetaTerm):
    """f-DPO: another divergence in place of the reverse KL."""

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    alpha: float = Field(0.5, gt=0, lt=1)
    """For `alpha`: near 0 it is the reverse KL, near 1 the forward KL."""


class SLiCTerm(Term):
    """SLiC-HF, on log-probabilities themselves."""

    delta: float = Field(1.0, gt=0)


class SimPOTerm(SmoothTerm):
    """SimPO; the paper's table has gamma / beta, 0.3 to 1.6 with beta 2 to 10."""

    beta: float = Field(2.0, gt=0)
    gamma: float = Field(1.0, ge=0)


class KTOTerm(BetaTerm):
    """KTO: single answers called good or bad, against the policy's mean distance from the reference."""

    desirable: float = Field(1.0, gt=0)
    """Weight of good answers; desirable x good rows / (undesirable x bad rows) should lie between 1 and 3/2."""
    undesirable: float = Field(1.0, gt=0)


PreferencePreset = Literal[
    "dpo", "cdpo", "robust", "ipo", "hinge", "dpo_norm", "rpo", "exo", "discopop", "f_dpo", "apo_zero", "apo_down",
    "sppo", "nca", "bco", "aot", "aot_unpaired", "slic", "simpo", "cpo", "orpo", "kto",
]  # fmt: skip

PREFERENCE_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"dpo": {"beta": 0.1}},
    "cdpo": {"dpo": {"beta": 0.1, "smoothing": 0.1}},
    "robust": {"robust": {"beta": 0.1, "smoothing": 0.1}},
    "ipo": {"ipo": {"beta": 0.1}},
    "hinge": {"hinge": {"beta": 0.1}},
    # Tulu 3 (2411.15124): beta 5 on means over tokens.
    "dpo_norm": {"dpo_norm": {"beta": 5.0}},
    # Iterative RPO (2404.19733): DPO and the NLL of the better answer.
    "rpo": {"dpo": {"beta": 0.1}, "nll": {"weight": 1.0}},
    "exo": {"exo": {"beta": 0.1}},
    "discopop": {"discopop": {"beta": 0.05, "tau": 0.05}},
    "f_dpo": {"f_dpo": {"beta": 0.1, "divergence": "js"}},
    "apo_zero": {"apo_zero": {"beta": 0.1}},
    "apo_down": {"apo_down": {"beta": 0.1}},
    # SPPO (2405.00675): eta = 1000.
    "sppo": {"sppo": {"beta": 0.001}},
    "nca": {"nca": {"beta": 0.01}},
    "bco": {"bco": {"beta": 0.1}},
    "aot": {"aot": {"beta": 0.1}},
    "aot_unpaired": {"aot_unpaired": {"beta": 0.1}},
    "slic": {"slic": {"delta": 1.0}, "nll": {"weight": 1.0}},
    # SimPO (2405.14734): Llama-3-Base's gamma / beta of 0.5.
    "simpo": {"simpo": {"beta": 2.0, "gamma": 1.0}},
    # CPO (2401.08417): a contrast and the NLL of the better answer.
    "cpo": {"contrast": {"beta": 0.1}, "nll": {"weight": 1.0}},
    # ORPO (2403.07691): NLL and a tenth of the odds ratio.
    "orpo": {"nll": {"weight": 1.0}, "odds_ratio": {"weight": 0.1}},
    "kto": {"kto": {"beta": 0.1}},
}
"""The named methods, as keys of `LossConfig`."""

REFERENCE_FREE = ("slic", "simpo", "contrast", "odds_ratio", "nll")
"""Losses that no reference enters (`formulas.preference.REFERENCE_FREE`; a law compares the two)."""

STEP_WIDE = ("bco", "aot", "aot_unpaired")
"""Losses that look at the whole step (`formulas.preference.STATISTICS`; a law compares the two)."""


class LossConfig(Strict):
    """A sum of preference losses, each weighted; no key of a loss that is not in the sum."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PREFERENCE_PRESETS

    preset: PreferencePreset | None = None
    dpo: SmoothTerm | None = None
    robust: RobustTerm | None = None
    ipo: IPOTerm | None = None
    hinge: BetaTerm | None = None
    dpo_norm: NormTerm | None = None
    exo: EXOTerm | None = None
    discopop: DiscoPOPTerm | None = None
    f_dpo: FDPOTerm | None = None
    apo_zero: BetaTerm | None = None
    apo_down: BetaTerm | None = None
    sppo: BetaTerm | None = None
    nca: BetaTerm | None = None
    bco: BetaTerm | None = None
    aot: SmoothTerm | None = None
    aot_unpaired: SmoothTerm | None = None
    slic: SLiCTerm | None = None
    simpo: SimPOTerm | None = None
    contrast: SmoothTerm | None = None
    odds_ratio: Term | None = None
    nll: Term | None = None
    kto: KTOTerm | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        """Keys beside a preset replace its own, number by number; `null` takes a loss out of it."""
        return with_preset(data, PREFERENCE_PRESETS)

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if not self.terms:
            raise ValueError("no loss is left; name a preset (dpo) or give one its section (dpo: {beta: 0.1})")
        if self.kto is not None and len(self.terms) > 1:
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
        return not set(self.terms).isdisjoint(STEP_WIDE)

    @property
    def why_pairs(self) -> str:
        """The complaint about more than two answers."""
        return (
            f"{', '.join(kind for kind in self.terms if kind in STEP_WIDE)}: takes a statistic over the step's pairs, "
            "one for each prompt; set pairs: best_worst"
        )

    @property
    def needs_reference(self) -> bool:
        """Whether some loss compares with a reference."""
        return not set(self.terms) <= set(REFERENCE_FREE)


class PreferenceTrainConfig(TrainConfig):
    """The same keys with DPO's default: a tenth of what RL or SFT would take, or the answers fall apart."""

    lr: float = Field(5e-7, ge=0)


class PreferenceStage(StageBase):
    """Learning from comparisons (or, with `loss: kto`, from answers called good or bad), without a reward model."""

    makes: ClassVar[Made | None] = "model"
    kind: Literal["preference"]
    data: Source
    eval_data: Source | None = None
    eval_every: int = Field(50, ge=1)
    """Steps between evaluations, where `eval_data` is given."""
    loss: LossConfig = LossConfig(preset="dpo")
    pairs: Literal["all", "best_worst"] = "all"
    """Of more than two ranked answers: every pair, or the best against the worst."""
    max_reference_gap: float = Field(0.02, gt=0)
    """Largest mean |log p - log p_ref| per token before the first update, when the two must be the same model."""
    train: PreferenceTrainConfig = PreferenceTrainConfig()

    @model_validator(mode="after")
    def _check(self) -> PreferenceStage:
        for source in (self.data, self.eval_data):
            if not isinstance(source, GeneratedConfig):
                continue
            if source.plain:
                raise ValueError("data.plain is running text, which nobody compares; leave it out")
            if source.answers > 2 and self.pairs == "all" and self.loss.pairs_only:
                raise ValueError(self.loss.why_pairs)
        return self

    def budget(self) -> Budget:
        """Rows of two answers, of one for KTO, or of as many as there are."""
        answers = 2 if self.pairs == "best_worst" else answers_of(self.data)
        return of_rows(self.data, self.train, answers=answers if self.loss.kto is None else 1)
