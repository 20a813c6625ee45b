"""Ratio and clip of a policy gradient: what the policy is compared with, and what bounds the comparison."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from whet.config.strict import Strict


class RatioConfig(Strict):
    """What the policy's probability is compared with, and over how many tokens."""

    level: Literal["none", "token", "sequence_mean", "sequence_mean_token", "sequence_product"] = "token"
    """token: PPO, GRPO. sequence_mean: GSPO's geometric mean. sequence_mean_token: that value with each token's own
    gradient. sequence_product: the whole answer's (R1 as printed). none: no ratio, plain log p (REINFORCE)."""
    denominator: Literal["old", "sampler"] = "old"
    """old: the trainer's own log-probabilities at rollout. sampler: what the sampler reported; saves a pass."""


class PPOClip(Strict):
    """min(r A, clip(r, 1 - low, 1 + high) A)."""

    kind: Literal["ppo"] = "ppo"
    low: float = Field(0.2, gt=0)
    high: float = Field(0.2, gt=0)
    dual: float | None = Field(None, gt=1)
    """Where the advantage is negative, the ratio counts for no more than this (dual clip)."""


class NoClip(Strict):
    """r A, unbounded."""

    kind: Literal["none"]


class GeometricClip(Strict):
    """GMPO: each token's log ratio clipped on the side where the clip acts, then the sequence's geometric mean."""

    kind: Literal["geometric"]
    low: float = Field(0.4, gt=0)
    """In nats."""
    high: float = Field(0.4, gt=0)


class CISPOClip(Strict):
    """min(r, cap) held constant, times A log p: no token loses its gradient."""

    kind: Literal["cispo"]
    cap: float = Field(5.0, gt=1)
    """The largest ratio itself (not 1 + something)."""


class SAPOClip(Strict):
    """A soft gate, 4/t sigmoid(t (r - 1)) A; t by the sign of the advantage."""

    kind: Literal["sapo"]
    positive: float = Field(1.0, gt=0)
    negative: float = Field(1.05, gt=0)


class DPPOClip(Strict):
    """min(r, cap) held constant, times A log p, dropped where the *probability* moved too far the way A points."""

    kind: Literal["dppo"]
    low: float = Field(0.15, gt=0, le=1)
    """Largest fall of a token's probability where its advantage is negative."""
    high: float = Field(0.15, gt=0, le=1)
    cap: float = Field(20.0, gt=1)


class QuadraticClip(Strict):
    """A log p - beta/2 (log r)^2: a spring in place of a wall (DRO, Kimi k1.5)."""

    kind: Literal["quadratic"]
    beta: float = Field(1.0, gt=0)


def kind_of(value: Any) -> Any:
    """The `kind` of a clip as it is written or as it was loaded; ppo where nothing is said."""
    return value.get("kind", "ppo") if isinstance(value, dict) else getattr(value, "kind", "ppo")


Clip = Annotated[
    Annotated[PPOClip, Tag("ppo")]
    | Annotated[NoClip, Tag("none")]
    | Annotated[GeometricClip, Tag("geometric")]
    | Annotated[CISPOClip, Tag("cispo")]
    | Annotated[SAPOClip, Tag("sapo")]
    | Annotated[DPPOClip, Tag("dppo")]
    | Annotated[QuadraticClip, Tag("quadratic")],
    Discriminator(kind_of),
]

TOKEN_CLIPS = ("geometric", "cispo", "dppo", "quadratic")
"""Forms that are defined for tokens only."""
