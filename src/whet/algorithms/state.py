"""What a run of policy gradients is given, and what it carries from step to step besides weights.

`RunState` is a value: `after` makes the next one, and what it saves is what a resumed run starts from.

Part of it is health. RL can lose everything silently: a rate that is a little too high takes a model from a quarter
solved to nothing in twenty steps while the loss looks as ever. `Health` sees each step's metrics, keeps a few running
averages (they are its whole state, and in the checkpoint), and says what it finds when it begins and again for every
window that it lasts. What is done about it is the recipe's choice (`HealthConfig`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, isnan, nan

from whet.algorithms.roles import Roles
from whet.algorithms.sft import PretrainingMix
from whet.algorithms.turns import Gain
from whet.config import PolicyConfig, TrainConfig
from whet.config.rl import Action, ConstraintConfig, HealthConfig
from whet.formulas.policy import adapt, charged, controlled, steer
from whet.formulas.step import RunningScale
from whet.records import Score

WATCHED = (
    "solved", "reward", "entropy", "completions/clipped_ratio", "frac_reward_zero_std", "kl", "clip_ratio",
    "sampling/logp_gap_mean", "grad_norm",
)  # fmt: skip
"""Metrics of which running averages are kept; `clip_ratio` is the sum of its two sides."""
PREFIX = "health/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong, and what the recipe wants done about it."""

    name: str
    line: str
    action: Action

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')}: {self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The monitor after some step. A value: `after` makes the next one."""

    config: HealthConfig
    state: Mapping[str, float] = field(default_factory=lambda: {"steps": 0.0, "rate": 1.0})
    """`NAME/mean`, `NAME/first`, `NAME/best` and `NAME/now` of what is watched, `FINDING/lasts` in steps, the factor of
    the learning rate, and the steps seen."""
    findings: tuple[Finding, ...] = ()
    """What is to be said after this step."""

    @classmethod
    def start(cls, config: HealthConfig, saved: Mapping[str, float]) -> Health:
        """At the beginning of a run, or from what an earlier step had saved."""
        state = {name.removeprefix(PREFIX): value for name, value in saved.items() if name.startswith(PREFIX)}
        return cls(config=config, state=state) if state else cls(config=config)

    @property
    def saved(self) -> dict[str, float]:
        """The state under names of its own among those of a step."""
        return {f"{PREFIX}{name}": value for name, value in self.state.items()}

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return self.state["rate"]

    def after(self, metrics: Mapping[str, float]) -> Health:
        """Having seen another step."""
        config = self.config
        state = {**_averages(self.state, metrics, config.window), "steps": self.state["steps"] + 1}
        findings = []
        for name, find in FINDERS.items():
            action: Action = getattr(config, name)
            line = find(state, config) if state["steps"] > config.window and action != "ignore" else None
            lasted = state[f"{name}/lasts"] if f"{name}/lasts" in state else 0.0
            state[f"{name}/lasts"] = lasted + 1 if line else 0.0
            if line and lasted % config.window == 0:
                findings.append(Finding(name=name, line=line, action=action))
        if any(finding.action == "lower" for finding in findings):
            state["rate"] *= config.lower_by
        return replace(self, state=state, findings=tuple(findings))

    @property
    def fatal(self) -> Finding | None:
        """A finding that ends the run here."""
        return next((finding for finding in self.findings if finding.action == "stop"), None)


def _averages(before: Mapping[str, float], metrics: Mapping[str, float], window: int) -> dict[str, float]:
    """Exponential averages over about `window` steps, each with its first and its best value."""
    state = dict(before)
    seen = {**metrics, "clip_ratio": sum(metrics[n] for n in metrics if n.startswith("clip_ratio/"))}
    for name in WATCHED:
        if name not in seen or not isfinite(seen[name]):
            continue
        if name == "grad_norm" and not seen[name]:  # a step without an update has no gradient to compare
            continue
        mean = f"{name}/mean"
        state[f"{name}/before"] = state[mean] if mean in state else seen[name]
        state[f"{name}/now"] = seen[name]
        state[mean] = state[f"{name}/before"] + (seen[name] - state[f"{name}/before"]) * 2 / (window + 1)
        state[f"{name}/first"] = state[f"{name}/first"] if f"{name}/first" in state else seen[name]
        state[f"{name}/best"] = max(state[mean], state[f"{name}/best"]) if f"{name}/best" in state else state[mean]
    return state


# ----------------------------------------------------------------------------------------------- findings

State = Mapping[str, float]


def _collapse(state: State, config: HealthConfig) -> str | None:
    name = "solved" if "solved/mean" in state else "reward"
    best, mean = state[f"{name}/best"], state[f"{name}/mean"]
    if best > 0.02 and mean < config.collapse_below * best:
        return f"{name} fell from {best:.3g} to {mean:.3g}; lower train.lr, or set health.collapse: stop"
    return None


def _entropy_loss(state: State, config: HealthConfig) -> str | None:
    solved = state["solved/mean"] if "solved/mean" in state else 0.0
    if "entropy/mean" in state and solved < 0.9:
        first, mean = state["entropy/first"], state["entropy/mean"]
        if mean < config.entropy_below * first:
            fell = f"entropy fell from {first:.3g} to {mean:.3g} nats per token"
            return f"{fell} with {solved:.0%} solved; try clip.high 0.28 or an entropy bonus"
    return None


def _length_runaway(state: State, config: HealthConfig) -> str | None:
    first, mean = state["completions/clipped_ratio/first"], state["completions/clipped_ratio/mean"]
    if mean > config.truncated_above and mean > 2 * first:
        return (
            f"{mean:.0%} of the answers are cut off, at first {first:.0%}; add an overlong reward or raise max_tokens"
        )
    return None


def _above(metric: str, limit: str, text: str) -> Callable[[State, HealthConfig], str | None]:
    """Found where the average of a metric is over a limit of the config; `text` has both in braces."""

    def find(state: State, config: HealthConfig) -> str | None:
        if f"{metric}/mean" not in state or state[f"{metric}/mean"] <= getattr(config, limit):
            return None
        return text.format(state[f"{metric}/mean"], getattr(config, limit))

    return find


def _gradient(state: State, config: HealthConfig) -> str | None:
    if "grad_norm/now" not in state:  # no step yet that had a gradient
        return None
    now, before = state["grad_norm/now"], state["grad_norm/before"]
    if before > 0 and now > config.gradient_above * before:
        return f"the gradient's norm is {now:.3g}, {now / before:.0f} times what it was"
    return None


FINDERS: dict[str, Callable[[State, HealthConfig], str | None]] = {
    "collapse": _collapse,
    "entropy_loss": _entropy_loss,
    "length_runaway": _length_runaway,
    "no_signal": _above(
        "frac_reward_zero_std",
        "equal_above",
        "{:.0%} of the groups have equal rewards; use tasks of another difficulty, or stop here",
    ),
    "far_from_reference": _above("kl", "kl_above", "the KL to the reference is {:.3g} nats per token (limit {})"),
    "clipping": _above(
        "clip_ratio", "clipped_above", "{:.0%} of the tokens are clipped (limit {:.0%}); lower train.lr"
    ),
    "gap": _above(
        "sampling/logp_gap_mean", "gap_above", "sampler and trainer differ by {:.3g} nats per token (limit {})"
    ),
    "gradient": _gradient,
}
"""What may be found; the names are the config's keys."""


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
    lag: int = 0
    """Steps by which rollouts may be older than what they train."""
    roles: Roles | None = None
    """What is asked of the roles of tokens; None: they are alike."""
    gain: Gain | None = None
    """How turns are rewarded for what they add to the probability of the right answer; None: they are not."""
    mix: PretrainingMix | None = None
    """PPO-ptx: what is imitated beside the policy gradient."""


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
