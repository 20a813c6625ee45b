"""The sections of a policy gradient that are more than a name: ratio, clip, KL and other terms, filters, correction."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, model_validator

from whet.config.data import Source
from whet.config.derived import FromFile, OneOf, section_of
from whet.config.model import Reference
from whet.config.presets import kind_of
from whet.config.strict import Made, Strict, path_of
from whet.formulas.policy import CORRECTIONS, KL_LOSSES, LEVELS, SURROGATES

# ------------------------------------------------------------------------------------------- ratio and clip


class RatioConfig(Strict):
    """What the policy's probability is compared with, and over how many tokens."""

    level: Annotated[str, OneOf(LEVELS)] = "token"
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
    estimator: Annotated[str, OneOf(["k1", *KL_LOSSES])] = "k3"
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

    kind: Annotated[str, OneOf(CORRECTIONS)] = "truncate"
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


class ValueModel(Strict):
    """What a critic's weights begin as. `model: PATH` is short for `model: {path: PATH}`."""

    refers_to: ClassVar[Made | None] = "reward"
    path: str
    """A model or a reward model with the policy's tokenizer: a hub id, a directory, or `@stage` that made a reward
    model."""


class GainConfig(Strict):
    """A turn is rewarded with what it adds to the probability that the policy gives to the right answer (IGPO).

    The probability at the beginning of a turn is exp(mean log p) of the answer's tokens, were it given there. The last
    turn gains nothing: it has the other rewards.
    """

    gold: str = "answer"
    """Column with the right answer; of a list the first."""
    before: str = ""
    """What the policy writes before an answer, where it writes something (`<answer>`)."""
    weight: float = Field(1.0, gt=0)


class CriticConfig(Strict):
    """A value model: what the state before each token is worth. Defaults: the N+ details of RLHF with PPO."""

    model: Annotated[ValueModel | None, BeforeValidator(path_of, json_schema_input_type=ValueModel | str | None)] = None
    """Where its weights come from; None: the policy that the stage starts from."""
    lr: float = Field(1e-5, ge=0)
    muon_lr: float = Field(1e-3, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam_policy: float = Field(0.95, ge=0, le=1)
    """Lambda of the policy's advantages."""
    length_alpha: float | None = Field(None, gt=0)
    """Instead of `lam_policy`: 1 - 1 / (alpha * trained tokens) for each answer (VAPO: 0.05)."""
    lam_value: float = Field(0.95, ge=0, le=1)
    """Lambda of the critic's targets (VC-PPO and VAPO: 1)."""
    level: Literal["token", "turn"] = "token"
    """turn: GAE over turns, the critic trained at the first token of each."""
    bootstrap_truncated: bool = False
    """Whether an answer that was cut off is continued by the value of its last state, or ends there (as is common)."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from what it was at the rollout; None: no bound."""
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    share_trunk: bool = False
    """One model with two heads instead of two models; the critic's loss is added to the policy's in one pass."""
    coefficient: float = Field(0.1, gt=0)
    """Weight of the critic's loss on a shared trunk."""
    pretrain_steps: int = Field(0, ge=0)
    """First steps in which only the critic learns, on Monte-Carlo returns (VC-PPO; VAPO: 50)."""
    scale_rewards: bool = False
    """Divide rewards by the standard deviation of all rewards so far."""

    @model_validator(mode="after")
    def _check(self) -> CriticConfig:
        if self.share_trunk and (self.pretrain_steps or self.model):
            raise ValueError("share_trunk has no critic of its own to load or to pretrain; leave the others out")
        return self

    @property
    def monte_carlo(self) -> CriticConfig:
        """The same with returns that do not lean on its own values: what a critic begins with."""
        return self.model_copy(update={"lam_value": 1.0})
