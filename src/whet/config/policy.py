"""The policy-gradient space: one section with one key for each axis, and presets that are points in it.

A preset (`config.presets`) is data: the axes that differ from `PolicyConfig`'s own defaults. Naming one and changing an
axis is how a variant is made; the loop in `algorithms.policy` has no branch for any of them. The names on an axis are
those of its table in `formulas`, and a clip's keys are its function's constants: adding a formula adds them here. What
would be meaningless is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, SerializeAsAny, Tag, model_validator

from whet.config.critic import CriticConfig
from whet.config.data import Source
from whet.config.derived import FromFile, OneOf, section_of
from whet.config.model import Reference, TeacherConfig
from whet.config.preset import kind_of, with_preset
from whet.config.presets import PRESETS
from whet.config.strict import Strict
from whet.formulas import kl, ratios
from whet.formulas.advantages import BASELINES, CREDITS, SCALES, TURN_BASELINES
from whet.formulas.policy import SURROGATES
from whet.formulas.reduce import REDUCTIONS

# ------------------------------------------------------------------------------------------- ratio and clip


class RatioConfig(Strict):
    """What the policy's probability is compared with, and over how many tokens."""

    level: Annotated[str, OneOf(ratios.LEVELS)] = "token"
    """token: PPO, GRPO. sequence_mean: GSPO's geometric mean. sequence_mean_token: that value with each token's own
    gradient. sequence_product: the whole answer's (R1 as printed). none: no ratio, plain log p (REINFORCE)."""
    denominator: Literal["old", "sampler"] = "old"
    """old: the trainer's own log-probabilities at rollout. sampler: what the sampler reported; saves a pass."""


class ClipSection(Strict):
    """What bounds the ratio: a surrogate of `formulas.policy`, with its constants as keys."""

    kind: str


class OwnClip(FromFile, ClipSection):
    """A surrogate of one's own, `(tokens, *, constants) -> loss of each token` of `formulas.policy.Tokens`."""

    kind: Literal["function"] = "function"


CLIPS = {
    kind: section_of(each.loss, f"{kind}_clip", base=ClipSection, kind=kind, module=__name__)
    for kind, each in SURROGATES.items()
}
if TYPE_CHECKING:
    Clip = ClipSection
else:
    OWN = Annotated[SerializeAsAny[OwnClip], Tag("function")]
    Clip = Annotated[reduce(or_, (*(Annotated[s, Tag(k)] for k, s in CLIPS.items()), OWN)), Discriminator(kind_of)]

# ------------------------------------------------------------------------------------- KL and other terms


class KLConfig(Strict):
    """A penalty for leaving the reference policy, which is frozen."""

    place: Literal["none", "reward", "loss"] = "none"
    estimator: Annotated[str, OneOf(["k1", *kl.LOSSES])] = "k3"
    """In the reward: k1 (and the default is). In the loss: k2 has on-policy the KL's gradient at its `level`, k3 is
    GRPO's, k3_unbiased is k3 times the ratio (DeepSeek-V3.2)."""
    level: Literal["token", "sequence"] = "token"
    """token: of the next token, the prefix as it is; what a token does to later ones has no gradient. sequence: one
    estimate from the whole answer's log-probability (R1 as printed)."""
    coefficient: float = Field(0.0, ge=0)
    target: float | None = Field(None, gt=0)
    """Nats for each answer at which a controller holds the KL by moving the coefficient; None: it is fixed."""
    horizon: int = Field(10_000, ge=1)
    """Answers over which the controller acts (Ziegler et al. 2019)."""
    reference: Reference = None
    """The model that it is measured from; None: the one that the stage starts from."""
    update_every: int | None = Field(None, ge=1)
    """Steps between updates of the reference; None: it stays what it is."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """EMA: the share of the old reference that an update keeps. 0: a hard copy of the policy."""

    @model_validator(mode="before")
    @classmethod
    def _estimator(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("place") == "reward":
            return {"estimator": "k1", **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.place != "none" and self.coefficient == 0:
            raise ValueError(f"place is {self.place} but coefficient is 0; set one of them")
        if self.place == "none" and (self.coefficient or self.target or self.update_every or self.reference):
            raise ValueError("place is none, so nothing else here has an effect; say place: loss or place: reward")
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 as a loss has an expected gradient of zero; use k2 or k3, or place: reward")
        if self.place == "reward" and (self.estimator != "k1" or self.level != "token"):
            raise ValueError("in the reward only k1 of tokens has the KL's gradient; use estimator: k1, level: token")
        return self


class EntropyConfig(Strict):
    """A bonus for entropy: coefficient x entropy is taken off the loss of each token."""

    coefficient: float = Field(0.0, ge=0)
    target: float | None = Field(None, gt=0)
    """Nats per token: below it the coefficient rises by `rate` each step, above it falls (Skywork-OR1)."""
    rate: float = Field(0.005, gt=0)

    @property
    def active(self) -> bool:
        """Whether there may be a bonus at all."""
        return self.coefficient > 0 or self.target is not None


class KLCovConfig(Strict):
    """KL-Cov: coefficient x |log r| on the tokens whose log-probability and advantage vary together most."""

    share: float = Field(2e-3, gt=0, le=1)
    coefficient: float = Field(1.0, gt=0)


# --------------------------------------------------------------------------------- filters and correction


class DynamicSamplingConfig(Strict):
    """Leave out groups that are all right or all wrong, and play more tasks until the step is full (DAPO)."""

    rounds: int = Field(1, ge=1)
    """Most times that tasks are drawn for one step; 1: leave out, do not refill."""


class HighEntropyFilter(Strict):
    """The gradient of the most uncertain tokens of the step only (80/20)."""

    kind: Literal["high_entropy"]
    share: float = Field(0.2, gt=0, le=1)


class CovarianceFilter(Strict):
    """Clip-Cov: a random `share` of the tokens whose covariance lies between `low` and `high` has no gradient."""

    kind: Literal["covariance"]
    share: float = Field(2e-4, gt=0, le=1)
    low: float = 1.0
    high: float = 5.0


TokenFilter = Annotated[HighEntropyFilter | CovarianceFilter, Field(discriminator="kind")]


class CorrectionConfig(Strict):
    """Weighs the loss by w = p(trainer) / p(sampler), where the two compute different probabilities."""

    kind: Annotated[str, OneOf(ratios.CORRECTIONS)] = "truncate"
    """truncate: min(w, high) (TIS). mask: w where low <= w <= high, else 0 (IcePop)."""
    level: Literal["token", "sequence_mean", "sequence_product"] = "token"
    low: float = Field(0.5, ge=0)
    high: float = Field(2.0, ge=1)
    """truncate: 2 (TIS). mask: 5 where nothing else is said (IcePop)."""

    @model_validator(mode="before")
    @classmethod
    def _bounds(cls, data: Any) -> Any:
        return {"high": 5.0, **data} if isinstance(data, dict) and data.get("kind") == "mask" else data


# ------------------------------------------------------------------------------------------- right answers


class PositiveConfig(Strict):
    """NLL on the answers that were right: mu x their mean -log p is added to the loss (VAPO: 0.1)."""

    coefficient: float = Field(0.1, gt=0)


class PtxConfig(Strict):
    """PPO-ptx: imitate rows of a data set beside the policy gradient, so that they are not unlearned (InstructGPT)."""

    data: Source
    coefficient: float = Field(gt=0)
    """Times the rows' mean NLL per token. InstructGPT's 27.8 belongs to its own batches; begin well below 1."""
    batch_size: int = Field(8, ge=1)
    """Rows for each optimizer step of the policy."""


# --------------------------------------------------------------------------------------------- the space


BY_GROUP = ("group_mean", "leave_one_out", "length_weighted_mean", *TURN_BASELINES)
"""Baselines that compare the answers to one prompt."""


class PolicyConfig(Strict):
    """A point in the space of policy gradients."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: Annotated[str, OneOf(PRESETS)] | None = None
    objectives: Literal["summed", "normalised"] = "summed"
    """How several rewards become one: weighed and added, or each normalised in its group before (GDPO)."""
    credit: Annotated[str, OneOf([*CREDITS, "process", "turns", "gae", "teacher"])] = "outcome"
    """What a token is credited with: the answer's whole reward; the grades of the steps that end with it or later,
    each against the group's other steps (baseline and scale are then over steps); what its turn and later turns
    brought, against turns like it (baseline and scale are then over turns); what comes from it on (KL or step grades in
    the reward); the critic's estimate of how much better it was than its state (GAE); or how much likelier the teacher
    finds it than the policy does (on-policy distillation; rewards are measured only)."""
    teacher: TeacherConfig | None = None
    """Of credit: teacher: a model with the policy's tokenizer, frozen."""
    turn_gamma: float = Field(1.0, gt=0, le=1)
    """credit: turns: the discount of a reward that comes one turn later."""
    state_weight: float = Field(1.0, ge=0)
    """baseline: same_state: the weight of a turn's advantage over turns from the same state beside the answer's own
    (GiGPO's omega)."""
    step_weight: float = Field(0.0, ge=0)
    """What a step's grade counts for in the reward of the token that completes it (return_to_go, gae)."""
    critic: CriticConfig | None = None
    baseline: Annotated[str, OneOf([*BASELINES, *TURN_BASELINES])] = "group_mean"
    """With credit: turns: turn_mean and turn_leave_one_out are over the same turn of the prompt's other answers,
    same_state over turns that began in the same state, beside the mean of whole answers."""
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
        for wrong, reason in self._contradictions():
            if wrong:
                raise ValueError(reason)
        return self

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """(whether it is so, the complaint), axis by axis."""
        yield from self._about_advantages()
        yield from self._about_updates()

    def _about_advantages(self) -> Iterator[tuple[bool, str]]:
        """Of what a token is credited with, against what, and on which scale."""
        by_group = self.baseline in BY_GROUP
        normalised = self.objectives == "normalised"
        yield (
            normalised and (self.credit != "outcome" or self.kl.place == "reward"),
            "objectives: normalised is of the rewards of whole answers; use credit: outcome and kl: {place: loss}",
        )
        yield (
            normalised and not by_group,
            f"objectives: normalised compares the answers of a group, and baseline is {self.baseline}; use group_mean",
        )
        yield (
            self.credit == "return_to_go" and self.kl.place != "reward" and not self.step_weight,
            "credit: return_to_go equals outcome without rewards on tokens; use kl: {place: reward} or step_weight",
        )
        yield (
            self.step_weight > 0 and self.credit in ("outcome", "process"),
            f"step_weight is for credit: gae or return_to_go; credit: {self.credit} does not look at tokens' rewards",
        )
        yield (
            self.credit == "process" and self.kl.place == "reward",
            "credit: process compares the grades of steps, and a KL in the reward is none; use kl: {place: loss}",
        )
        yield (
            self.credit == "process" and self.baseline == "greedy",
            "baseline: greedy is the reward of a whole answer, and credit: process has those of steps; use group_mean",
        )
        yield (
            self.credit == "turns" and self.baseline not in ("none", *TURN_BASELINES),
            f"credit: turns compares turns, and baseline {self.baseline} is of whole answers; use turn_leave_one_out",
        )
        yield (
            self.credit != "turns" and self.baseline in TURN_BASELINES,
            f"baseline: {self.baseline} compares turns; use credit: turns",
        )
        yield (
            self.credit != "turns" and self.turn_gamma != 1,
            f"turn_gamma is for credit: turns, and credit is {self.credit}; leave it out",
        )
        yield (
            self.baseline != "same_state" and self.state_weight != 1,
            f"state_weight is for baseline: same_state, and baseline is {self.baseline}; leave it out",
        )
        yield (
            self.credit == "gae" and self.critic is None,
            "credit: gae needs the values of a critic; add critic: {}",
        )
        yield (
            self.critic is not None and self.credit != "gae",
            f"critic has no effect with credit: {self.credit}; use credit: gae",
        )
        yield (
            self.credit == "gae" and self.baseline != "none",
            f"credit: gae has its baseline in the critic, and baseline is {self.baseline}; use baseline: none",
        )
        yield (
            (self.credit == "teacher") != (self.teacher is not None),
            "credit: teacher and teacher: {path: MODEL} go together; give both, or neither",
        )
        yield (
            self.credit == "teacher" and (self.baseline != "none" or self.kl.place == "reward"),
            "credit: teacher takes nothing from rewards; use baseline: none, and no kl: {place: reward}",
        )
        yield (
            self.scale in ("group_std", "informative_share") and not by_group,
            f"scale: {self.scale} needs a group's baseline, and baseline is {self.baseline}; use batch_std or none",
        )

    def _about_updates(self) -> Iterator[tuple[bool, str]]:
        """Of ratio, clip, reduction and correction: what becomes of advantages in the loss."""
        level, kind = self.ratio.level, self.clip.kind
        sequence = level in ("sequence_mean", "sequence_product") or kind == "geometric"
        yield (
            sequence and (self.credit != "outcome" or self.token_filter is not None),
            "a ratio of whole sequences needs one advantage for all tokens; use ratio: {level: sequence_mean_token}",
        )
        yield (
            self.positive_nll is not None and self.reduction != "token_mean",
            "positive_nll is a mean over tokens; use reduction: token_mean",
        )
        yield (
            level == "none" and kind not in ("none", "function"),
            f"clip: {kind} bounds a ratio, and ratio.level is none; use clip: {{kind: none}}",
        )
        yield (
            level == "none" and self.minibatches > 1,
            "ratio.level: none is right for the first update only, and minibatches makes more; use ratio.level: token",
        )
        yield (
            kind in SURROGATES and SURROGATES[kind].of_tokens and level != "token",
            f"clip: {kind} is defined for the ratio of tokens; use ratio: {{level: token}}",
        )
        yield (
            self.correction is not None and self.ratio.denominator == "sampler",
            "ratio.denominator: sampler already divides by the sampler's probability; correction would do it twice",
        )
        yield (
            self.correction is not None and self.correction.low >= self.correction.high,
            "correction.low must be below correction.high",
        )

    def check_constrained(self) -> None:
        """Raise `ValueError` where a constraint on the cost of whole answers could not act on this point."""
        if self.scale == "group_std" and self.objectives == "summed":
            raise ValueError(
                "constraint: scale: group_std makes a group whose answers differ in nothing but the cost as loud as "
                "any, whatever the multiplier; use algorithm.scale: batch_std, token_std or none"
            )
        if self.dynamic_sampling is not None:
            raise ValueError(
                "constraint: dynamic sampling leaves out groups that are all right, and their answers differ in cost; "
                "set algorithm.dynamic_sampling: null"
            )
        if self.credit == "process" or self.step_weight:
            raise ValueError(
                "constraint: the cost is one of whole answers, and grades of steps are not charged with it"
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
    def needs_gradient_everywhere(self) -> bool:
        """Whether tokens without an advantage have a gradient too."""
        return (
            self.kl.place == "loss"
            or self.entropy.active
            or self.kl_cov is not None
            or self.positive_nll is not None
            or self.shares_trunk
            or self.clip.kind in ("quadratic", "function")
        )

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a second head on the policy."""
        return self.critic is not None and self.critic.share_trunk

    def check_step(
        self, *, prompts: int, rollouts: int, objectives: int, judged: bool, graded_steps: bool, lora: bool
    ) -> None:
        """Raise `ValueError` where a stage's numbers make this point meaningless.

        `prompts` and `rollouts` of one step; `objectives`: rewards that count for something; `judged`: some reward
        says whether an answer is right; `graded_steps`: some reward grades the steps of an answer; `lora`: the
        reference is the model with its adapter off.
        """
        if (self.credit == "process" or self.step_weight) and not graded_steps:
            what = "credit: process" if self.credit == "process" else "step_weight"
            raise ValueError(f"algorithm.{what} needs the grades of steps; add a reward of kind steps or process_model")
        if self.objectives == "normalised" and objectives < 2:
            raise ValueError(
                "algorithm.objectives: normalised balances several rewards, and one alone has a weight other than 0; "
                "add another (kind: format, say) or use scale: batch_std with summed"
            )
        if rollouts < 2 and self.baseline in BY_GROUP:
            raise ValueError(
                f"rollouts_per_prompt must be at least 2: a group of one has no baseline ({self.baseline}); "
                "or use algorithm.baseline: batch_mean, greedy or none"
            )
        if prompts < 2 and "batch" in self.baseline + self.scale:
            raise ValueError("prompts_per_step must be at least 2: statistics over the batch need more than one group")
        if self.dynamic_sampling and not judged:
            raise ValueError(
                "algorithm.dynamic_sampling asks which answers are right, and no reward judges that (a shaped reward "
                "differs inside an all-right group); add one that does, or set dynamic_sampling: null"
            )
        if self.kl.update_every and lora:
            raise ValueError(
                "algorithm.kl.update_every cannot update the reference of a LoRA run, which is the model with its "
                "adapter off; set it to null or train all weights"
            )
