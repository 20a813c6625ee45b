"""The policy-gradient space: one section with one key for each axis, and presets that are points in it.

A preset (`config.presets`) is data: the axes that differ from `PolicyConfig`'s own defaults. Naming one and changing an
axis is how a variant is made; the loop in `algorithms.policy` has no branch for any of them. The names on an axis are
those of its table in `formulas`, and a clip's keys are its function's constants: adding a formula adds them here. What
would be meaningless is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.derived import OneOf
from whet.config.model import TeacherConfig
from whet.config.policy_terms import (
    CLIPS,
    Clip,
    CorrectionConfig,
    CriticConfig,
    DynamicSamplingConfig,
    EntropyConfig,
    GainConfig,
    KLConfig,
    KLCovConfig,
    PositiveConfig,
    PtxConfig,
    RatioConfig,
    TokenFilter,
)
from whet.config.presets import PRESETS, with_preset
from whet.config.strict import Strict
from whet.formulas.policy import SURROGATES
from whet.formulas.step import BASELINES, BESIDE_WHOLE, CREDITS, REDUCTIONS, SCALES, TURN_BASELINES

# --------------------------------------------------------------------------------------------- the space


BY_GROUP = ("group_mean", "leave_one_out", "length_weighted_mean", *TURN_BASELINES)
"""Baselines that compare the answers to one prompt."""


class PolicyConfig(Strict):
    """A point in the space of policy gradients."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: Annotated[str, OneOf(PRESETS)] | None = None
    objectives: Literal["summed", "normalised"] = "summed"
    """How several rewards become one: weighed and added, or each normalised in its group before (GDPO)."""
    credit: Annotated[str, OneOf([*CREDITS, "process", "turns", "tree", "gae", "teacher"])] = "outcome"
    """What a token is credited with: the answer's whole reward; the grades of the steps that end with it or later,
    each against the group's other steps (baseline and scale are then over steps); what its turn and later turns
    brought, against turns like it (baseline and scale are then over turns); how much better the plays from there on
    are than those from the turn before (the stage's `branches`); what comes from it on (KL or step grades in the
    reward); the critic's estimate of how much better it was than its state (GAE); or how much likelier the teacher
    finds it than the policy does (on-policy distillation; rewards are measured only)."""
    teacher: TeacherConfig | None = None
    """Of credit: teacher: a model with the policy's tokenizer, frozen."""
    turn_gamma: float = Field(1.0, gt=0, le=1)
    """credit: turns: the discount of a reward that comes one turn later."""
    turn_weight: float = Field(1.0, ge=0)
    """baseline: same_state or turn_index: the weight of a turn's advantage beside that of the whole answer (GiGPO's
    omega, MT-GRPO's coefficient)."""
    gain: GainConfig | None = None
    """credit: turns or gae: the information that a turn gained as a reward of that turn."""
    step_weight: float = Field(0.0, ge=0)
    """What a step's grade counts for in the reward of the token that completes it (return_to_go, gae)."""
    critic: CriticConfig | None = None
    baseline: Annotated[str, OneOf([*BASELINES, *TURN_BASELINES])] = "group_mean"
    """With credit: turns: turn_mean and turn_leave_one_out are over the same turn of the prompt's other answers,
    same_state over turns that began in the same state, beside the mean of whole answers; turn_index is of a turn's own
    reward over the same turn, beside the mean of what else whole answers got."""
    scale: Annotated[str, OneOf(SCALES)] = "group_std"
    ratio: RatioConfig = RatioConfig()
    clip: Clip = CLIPS["ppo"](kind="ppo")
    kl: KLConfig = KLConfig()
    reduction: Annotated[str, OneOf(REDUCTIONS)] = "token_mean"
    dynamic_sampling: DynamicSamplingConfig | None = None
    overlong_filter: bool = False
    """Leave truncated completions out of the loss, after the group's statistics were taken."""
    token_filter: TokenFilter | None = None
    correction: CorrectionConfig | None = None
    entropy: EntropyConfig = EntropyConfig()
    kl_cov: KLCovConfig | None = None
    positive_nll: PositiveConfig | None = None
    ptx: PtxConfig | None = None
    minibatches: int = Field(1, ge=1)
    """Optimizer steps for one batch of rollouts, at most one for each prompt; the clip acts from the second on."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        """`algorithm: dapo` is short for `{preset: dapo}`; keys beside a preset replace its own, axis by axis."""
        return with_preset(data, PRESETS)

    @model_validator(mode="after")
    def _check(self) -> PolicyConfig:
        for about in (_about_rewards, _about_credit, _about_turns, _about_updates):
            for complaint in about(self):
                raise ValueError(complaint)
        return self

    def check_lag(self, steps: int) -> None:
        """Raise `ValueError` where nothing corrects for rollouts of weights that are older by so many steps."""
        if self.correction is None and self.ratio.denominator != "sampler":
            raise ValueError(
                f"lag.steps: {steps} trains on samples of older weights, and nothing corrects for that; add algorithm: "
                "{correction: {kind: truncate}}, use ratio: {denominator: sampler} or preset: decoupled_ppo, or set "
                "lag.steps: 0"
            )

    def cautions(self, *, prompts: int) -> list[str]:
        """What is allowed and seldom meant, with `prompts` a step, for people to read."""
        lines = []
        if prompts < self.minibatches:
            no_clip = ", and no clip ever acts" if prompts == 1 else ""
            lines.append(
                f"prompts_per_step: {prompts} gives {prompts} of the {self.minibatches} updates of "
                f"algorithm.minibatches (each takes whole groups){no_clip}"
            )
        of_answers = [
            name
            for name, holds in (
                (f"ratio.level: {self.ratio.level}", self.ratio.level in ("sequence_mean", "sequence_product")),
                (f"clip: {self.clip.kind}", self.clip.kind == "geometric"),
                ("kl.level: sequence", self.kl.place == "loss" and self.kl.level == "sequence"),
            )
            if holds
        ]
        if of_answers and self.reduction != "sequence_mean":
            lines.append(
                f"algorithm.reduction: {self.reduction} counts a term of whole answers ({', '.join(of_answers)}) once "
                "for each token, so answers weigh by their length; use reduction: sequence_mean unless that is meant"
            )
        return lines

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a second head on the policy."""
        return self.critic is not None and self.critic.share_trunk


def _about_rewards(point: PolicyConfig) -> Iterator[str]:
    """Of rewards, of whole answers, tokens or steps, and what they are compared with."""
    normalised, baseline = point.objectives == "normalised", point.baseline
    if normalised and (point.credit != "outcome" or point.kl.place == "reward"):
        yield "objectives: normalised is of the rewards of whole answers; use credit: outcome and kl: {place: loss}"
    if normalised and baseline not in BY_GROUP:
        yield f"objectives: normalised compares the answers of a group, and baseline is {baseline}; use group_mean"
    if point.credit == "return_to_go" and point.kl.place != "reward" and not point.step_weight:
        yield "credit: return_to_go equals outcome without rewards on tokens; use kl: {place: reward} or step_weight"
    if point.step_weight > 0 and point.credit in ("outcome", "process"):
        yield f"step_weight is for credit: gae or return_to_go; credit: {point.credit} does not look at tokens' rewards"
    if point.credit == "process" and point.kl.place == "reward":
        yield "credit: process compares the grades of steps, and a KL in the reward is none; use kl: {place: loss}"
    if point.credit == "process" and point.baseline == "greedy":
        yield "baseline: greedy is the reward of a whole answer, and credit: process has those of steps; use group_mean"


def _about_credit(point: PolicyConfig) -> Iterator[str]:
    """Of a critic's and of a teacher's credit, and of the scale."""
    if point.credit == "gae" and point.critic is None:
        yield "credit: gae needs the values of a critic; add critic: {}"
    if point.critic is not None and point.credit != "gae":
        yield f"critic has no effect with credit: {point.credit}; use credit: gae"
    if point.credit == "gae" and point.baseline != "none":
        yield f"credit: gae has its baseline in the critic, and baseline is {point.baseline}; use baseline: none"
    if (point.credit == "teacher") != (point.teacher is not None):
        yield "credit: teacher and teacher: {path: MODEL} go together; give both, or neither"
    if point.credit == "teacher" and (point.baseline != "none" or point.kl.place == "reward"):
        yield "credit: teacher takes nothing from rewards; use baseline: none, and no kl: {place: reward}"
    grouped = point.baseline in BY_GROUP or point.credit == "tree"
    if point.scale in ("group_std", "informative_share") and not grouped:
        yield f"scale: {point.scale} needs a group's baseline, and baseline is {point.baseline}; use batch_std or none"


def _about_turns(point: PolicyConfig) -> Iterator[str]:
    """Of credit for single turns."""
    if point.credit == "turns" and point.baseline not in ("none", *TURN_BASELINES):
        yield f"credit: turns compares turns, and baseline {point.baseline} is of whole answers; use turn_leave_one_out"
    if point.credit != "turns" and point.baseline in TURN_BASELINES:
        yield f"baseline: {point.baseline} compares turns; use credit: turns"
    if point.credit != "turns" and point.turn_gamma != 1:
        yield f"turn_gamma is for credit: turns, and credit is {point.credit}; leave it out"
    if point.baseline not in BESIDE_WHOLE and point.turn_weight != 1:
        of = " or ".join(BESIDE_WHOLE)
        yield f"turn_weight is for baseline: {of}, and baseline is {point.baseline}; leave it out"
    if point.baseline == "turn_index" and point.turn_gamma != 1:
        yield "turn_gamma discounts later turns, and baseline: turn_index looks at each by itself; leave it out"
    if point.credit == "tree" and (point.baseline != "none" or point.kl.place == "reward"):
        yield "credit: tree has its baseline in the turn before; use baseline: none, and no kl: {place: reward}"
    if point.gain is not None and point.credit not in ("turns", "gae"):
        yield f"gain rewards single turns, and credit: {point.credit} does not look at them; use credit: turns"


def _about_updates(point: PolicyConfig) -> Iterator[str]:
    """Of ratio, clip, reduction and correction: what becomes of advantages in the loss."""
    level, kind = point.ratio.level, point.clip.kind
    sequence = level in ("sequence_mean", "sequence_product") or kind == "geometric"
    if sequence and (point.credit != "outcome" or point.token_filter is not None):
        yield "a ratio of whole sequences needs one advantage for all tokens; use ratio: {level: sequence_mean_token}"
    if point.positive_nll is not None and point.reduction != "token_mean":
        yield "positive_nll is a mean over tokens; use reduction: token_mean"
    if level == "none" and kind not in ("none", "function"):
        yield f"clip: {kind} bounds a ratio, and ratio.level is none; use clip: {{kind: none}}"
    if level == "none" and point.minibatches > 1:
        yield "ratio.level: none is right for the first update only, and minibatches makes more; use ratio.level: token"
    if kind in SURROGATES and SURROGATES[kind].of_tokens and level != "token":
        yield f"clip: {kind} is defined for the ratio of tokens; use ratio: {{level: token}}"
    if point.correction is not None and point.ratio.denominator == "sampler":
        yield "ratio.denominator: sampler already divides by the sampler's probability; correction would do it twice"
    if point.correction is not None and point.correction.low >= point.correction.high:
        yield "correction.low must be below correction.high"
