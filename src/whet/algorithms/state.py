"""What a run of policy gradients is given, and what it carries from step to step besides weights.

`RunState` is a value: `after` makes the next one, and what it saves is what a resumed run starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isnan, nan

from whet.algorithms.critic import RunningScale
from whet.algorithms.health import Health
from whet.algorithms.ptx import PretrainingMix
from whet.config import PolicyConfig, TrainConfig
from whet.config.constraint import ConstraintConfig
from whet.config.health import HealthConfig
from whet.formulas.constraint import charged, controlled
from whet.formulas.kl import adapt
from whet.formulas.policy import steer
from whet.records import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The constants of a run of `policy_gradient`."""

    config: PolicyConfig
    train: TrainConfig
    steps: int
    prompts_per_step: int
    temperature: float
    max_tokens: int
    max_gap: float
    weights: Mapping[str, float]
    """Those of the rewards that count for something, by name."""
    constraint: ConstraintConfig | None = None
    health: HealthConfig = field(default_factory=HealthConfig)
    seed: int = 0
    mix: PretrainingMix | None = None
    """PPO-ptx: what is imitated beside the policy gradient."""
    patience: int = 20
    """Steps in a row without any signal, after which it gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What controllers may move from step to step: the weights of the KL and of the entropy bonus."""

    kl: float
    entropy: float

    @classmethod
    def start(cls, config: PolicyConfig, state: Mapping[str, float]) -> Coefficients:
        """The recipe's, or where a run goes on those that it had reached."""
        if state:
            return cls(kl=state["kl_coefficient"], entropy=state["entropy_coefficient"])
        return cls(kl=config.kl.coefficient, entropy=config.entropy.coefficient)

    def after(self, config: PolicyConfig, metrics: Mapping[str, float], *, answers: int) -> Coefficients:
        """Those of the next step; a controller without its measurement, or without a target, stands still."""
        kl, entropy = self.kl, self.entropy
        if config.kl.target is not None and "kl/sequence" in metrics:
            horizon = config.kl.horizon
            kl = adapt(kl, metrics["kl/sequence"], target=config.kl.target, answers=answers, horizon=horizon)
        if config.entropy.target is not None and "entropy" in metrics:
            entropy = steer(entropy, metrics["entropy"], target=config.entropy.target, rate=config.entropy.rate)
        return Coefficients(kl=kl, entropy=entropy)

    @property
    def state(self) -> dict[str, float]:
        """What `start` goes on from."""
        return {"kl_coefficient": self.kl, "entropy_coefficient": self.entropy}


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a constraint takes off rewards: the Lagrange multiplier as it stands."""

    config: ConstraintConfig
    integral: float
    multiplier: float

    @classmethod
    def start(cls, config: ConstraintConfig | None, saved: Mapping[str, float]) -> Charge | None:
        """At the recipe's `start`, or from what an earlier step had saved."""
        if config is None:
            return None
        integral = saved["constraint_integral"] if saved else config.initial_multiplier
        return cls(config=config, integral=integral, multiplier=integral)

    def reward(self, score: Score) -> float:
        """A scored answer's reward after its cost; one to which the cost does not apply has none."""
        assert score.value is not None, "only scored answers have a reward"
        return charged(score.value, score.parts[self.config.cost] or 0.0, multiplier=self.multiplier)

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """The same for rewards that are normalised one by one: the cost is one more, below zero."""
        share = 1 / (1 + self.multiplier)
        others = {name: weight * share for name, weight in weights.items()}
        return {**others, self.config.cost: -self.multiplier * share}

    def seeing(self, metrics: Mapping[str, float], *, still: bool) -> Charge:
        """Having seen what the step's answers cost, before they are charged; where nothing did, as at the limit.

        While the policy stands `still` it cannot answer, so nothing is added up.
        """
        c = self.config
        cost = metrics.get(f"rewards/{c.cost}", nan)
        cost = c.limit if isnan(cost) else cost
        gain = 0.0 if still else c.integral
        integral = controlled(self.integral, cost, limit=c.limit, gain=gain, most=c.max_multiplier)
        multiplier = controlled(integral, cost, limit=c.limit, gain=c.proportional, most=c.max_multiplier)
        return replace(self, integral=integral, multiplier=multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run carries from step to step besides weights: controllers, the spread of rewards, health."""

    coefficients: Coefficients
    charge: Charge | None
    spread: RunningScale
    health: Health
    updates: float = 0.0
    """Optimizer steps of the policy so far: with none, it still is what the stage started from."""
    barren: float = 0.0
    """Steps in a row without a signal to learn from."""

    @classmethod
    def start(cls, setting: Setting, saved: Mapping[str, float]) -> RunState:
        """At the beginning of a run, or from what an earlier step had saved."""
        return cls(
            coefficients=Coefficients.start(setting.config, saved),
            charge=Charge.start(setting.constraint, saved),
            spread=RunningScale.start(saved),
            health=Health.start(setting.health, saved),
            updates=saved["updates"] if saved else 0.0,
            barren=saved["barren"] if saved else 0.0,
        )

    @property
    def saved(self) -> dict[str, float]:
        """What `start` goes on from."""
        counts = {"updates": self.updates, "barren": self.barren}
        charge = {} if self.charge is None else {"constraint_integral": self.charge.integral}
        return {**self.coefficients.state, **charge, **self.spread.saved, **self.health.saved, **counts}

    def reward(self, score: Score) -> float:
        """What a scored answer is rewarded with now."""
        if self.charge is not None:
            return self.charge.reward(score)
        assert score.value is not None, "only scored answers have a reward"
        return score.value

    def weights(self, setting: Setting) -> Mapping[str, float]:
        """What each reward counts for now."""
        return setting.weights if self.charge is None else self.charge.weights(setting.weights)

    def seeing(self, metrics: Mapping[str, float], *, still: bool) -> RunState:
        """Having seen a step's answers, before they are rewarded; `still`: the policy will not learn from them."""
        return self if self.charge is None else replace(self, charge=self.charge.seeing(metrics, still=still))

    def after(self, metrics: Mapping[str, float], setting: Setting, *, answers: int) -> RunState:
        """Having seen another step."""
        coefficients = self.coefficients.after(setting.config, metrics, answers=answers)
        learnt = metrics["optimizer_steps"] + metrics["value/optimizer_steps"]
        return replace(
            self,
            coefficients=coefficients,
            health=self.health.after(metrics),
            updates=self.updates + metrics["optimizer_steps"],
            barren=0.0 if learnt else self.barren + 1,
        )
