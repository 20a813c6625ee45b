"""The critic of PPO and its relatives: what it begins with, how it judges and how it learns."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from whet.config.strict import Made, Strict, path_of


class ValueModel(Strict):
    """What a critic's weights begin as. `model: PATH` is short for `model: {path: PATH}`."""

    refers_to: ClassVar[Made | None] = "reward"
    path: str
    """A model or a reward model with the policy's tokenizer: a hub id, a directory, or `@stage` that made a reward
    model."""


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
