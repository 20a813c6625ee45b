"""The policy-gradient space: one section with one key for each axis, and presets that are points in it.

A preset is data: the axes that differ from `PolicyConfig`'s own defaults. Naming one and changing an axis is how
a variant is made; the loop in `algorithms.policy` has no branch for any of them. `formulas` holds the functions
that the names stand for (a law in the tests holds the two together).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Preset = Literal["grpo", "dapo", "dr_grpo"]

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (2402.03300): group mean and std, 1/|o| per sequence, k3 KL to the reference in the loss.
    "grpo": {
        "scale": "group_std",
        "aggregate": "sequence_mean",
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.04},
    },
    # DAPO (2503.14476): clip-higher, token-level loss, dynamic sampling, no KL. The soft overlong punishment is a
    # reward (`kind: overlong`); overlong filtering is an option that the paper's best run left off.
    "dapo": {
        "scale": "group_std",
        "aggregate": "token_mean",
        "clip": {"low": 0.2, "high": 0.28},
        "dynamic_sampling": {"rounds": 10},
    },
    # Dr. GRPO (2503.20783): no std, a constant length in the denominator.
    "dr_grpo": {"scale": "none", "aggregate": "sequence_sum_over_constant"},
}


class _Axis(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ClipConfig(_Axis):
    """Bounds of the ratio: clip(r, 1 - low, 1 + high)."""

    low: float = Field(0.2, gt=0)
    high: float = Field(0.2, gt=0)


class KLConfig(_Axis):
    """A penalty for leaving the reference policy (the stage's starting weights, frozen)."""

    place: Literal["none", "loss"] = "none"
    estimator: Literal["k2", "k3"] = "k3"
    coefficient: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.place == "loss" and self.coefficient == 0:
            raise ValueError("place is loss but coefficient is 0; set one of them")
        return self


class DynamicSamplingConfig(_Axis):
    """Leave out groups that are all right or all wrong, and play more tasks until the step is full (DAPO)."""

    rounds: int = Field(1, ge=1)
    """Most times that tasks are drawn for one step; 1: leave out, do not refill."""


class PolicyConfig(_Axis):
    """A point in the space of group-relative policy gradients."""

    preset: Preset | None = None
    baseline: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    scale: Literal["none", "group_std"] = "group_std"
    clip: ClipConfig = ClipConfig()
    kl: KLConfig = KLConfig()
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum_over_constant"] = "token_mean"
    dynamic_sampling: DynamicSamplingConfig | None = None
    overlong_filter: bool = False
    """Leave truncated completions out of the loss, after the group's statistics were taken."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps for one batch of rollouts; the clip acts from the second on."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        """`algorithm: dapo` is short for `{preset: dapo}`; keys beside a preset replace its own, axis by axis."""
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict) or data.get("preset") not in PRESETS:
            return data
        merged: dict[str, Any] = dict(data)
        for axis, value in PRESETS[data["preset"]].items():
            given = data.get(axis)
            if axis not in data:
                merged[axis] = value
            elif isinstance(value, dict) and isinstance(given, dict):
                merged[axis] = {**value, **given}
        return merged
