"""How long is a step of RL on a cluster? Discrete events: one heap, no cluster.

Samplers decode side by side (processor sharing: a token of every running answer takes `token_s + row_s * running`
seconds), groups are admitted while their position is below `(version + lag + 1) * prompts` and consumed in the `order`
of the feed, the trainer reads them, and the weights are pushed. What it does not know is listed in docs/scale.md; of
what lag costs in accuracy it says nothing.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

Order = Literal["exact", "strict", "window", "any"]
ORDERS: tuple[Order, ...] = get_args(Order)
DAY_S = 86400.0
SETTLE = 3
"""Steps before the first that counts: at first no answer of earlier steps is under way."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of an answer: lognormal, cut at `most`; or drawn from those that a run has had."""

    mean: float = 2500
    """Of the answers after the cut."""
    spread: float = 0.73
    """Standard deviation of the logarithm."""
    most: int = 28672
    seen: Sequence[int] = ()

    def draw(self, random_: random.Random) -> float:
        """One answer."""
        return random_.choice(self.seen) if self.seen else min(self.most, random_.lognormvariate(self.mu, self.spread))

    @cached_property
    def mu(self) -> float:
        """The lognormal's, such that the mean after the cut is `mean`, by bisection."""
        low, high = 0.0, math.log(self.most) + 3
        for _ in range(50):
            mu = (low + high) / 2
            low, high = (mu, high) if self._cut_mean(mu) < self.mean else (low, mu)
        return low

    def _cut_mean(self, mu: float) -> float:
        """E min(X, most) of a lognormal X."""
        z = (math.log(self.most) - mu) / self.spread
        return math.exp(mu + self.spread**2 / 2) * _normal(z - self.spread) + self.most * (1 - _normal(z))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A cluster and what runs on it. The rates are those of verl's 7B model on H20 GPUs (docs/scale.md)."""

    trainer_gpus: int
    sampler_gpus: int
    beside: bool = False
    """All GPUs sample, then all train: both numbers are of the same GPUs, and the lag is 0."""
    prompts: int
    samples: int
    """Answers to each prompt."""
    lengths: Lengths = field(default_factory=Lengths)
    replica_gpus: int = 4
    """GPUs of one sampler."""
    running: int = 1024
    """Most answers side by side in one sampler."""
    token_s: float = 0.0054
    """Seconds that a token takes however few answers are decoded."""
    row_s: float = 0.000034
    """Seconds more for each answer that is decoded beside it."""
    train_rate: float = 2946
    """Tokens a second that a GPU of the trainer reads: log-probabilities and update together."""
    update_s: float = 2.85
    """Seconds of an optimizer step that do not depend on its tokens."""
    push_s: float = 4
    """Weights from the trainer to the samplers; both stand still."""
    lag: float = 0
    order: Order = "window"
    window: float = 0.3
    """Of the `(lag + 1) * prompts` groups that may be under way."""
    minibatches: int = 1
    """Optimizer steps of a step."""
    streamed: bool = False
    """Train a mini-batch as soon as its groups are there; else when those of the whole step are, as whet does."""
    failures: float = 0
    """Of one GPU in a day."""
    restart_s: float = 300
    save_steps: int = 10
    """Steps between checkpoints, which a failed trainer goes back to."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.trainer_gpus if self.beside else self.trainer_gpus + self.sampler_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Means over the steps that count."""

    step_s: float
    trainer_idle: float
    """Share of the time."""
    sampler_idle: float
    lag: float
    """Versions between the beginning of an answer and its training."""
    greatest_lag: int
    tokens_s: float
    """Trained tokens a second of each GPU."""


def simulate(setup: Setup, *, steps: int = 4, seed: int = 0) -> Simulated:
    """Run `steps` steps after `SETTLE` others."""
    return _Cluster(setup, seed).run(steps)


@dataclass(slots=True)
class _Replica:
    """A sampler; `clock` counts the tokens that each answer in it has been given."""

    clock: float = 0
    at: float = 0
    """When `clock` was right."""
    paused: float = 0
    """Until when it stands still."""
    stamp: int = 0
    running: list[tuple[float, int, int, float]] = field(default_factory=list)
    """Heap of (clock at its end, number, position, length)."""
    busy_s: float = 0
    version: int = 0
    down: bool = False


class _Cluster:
    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.random, self.now, self.version = setup, random.Random(seed), 0.0, 0
        self.replicas = [_Replica() for _ in range(max(1, setup.sampler_gpus // setup.replica_gpus))]
        self.events: list[tuple[float, int, str, int, int]] = []
        self.count = 0
        self.started = 0
        """Groups that were admitted."""
        self.pending: deque[tuple[int, float]] = deque()
        self.open = [(0, number) for number in range(len(self.replicas))]
        """Heap of (load, replica); entries of another load than the replica's are old."""
        self.owed = 0
        self.missing: dict[int, int] = {}
        self.group: dict[int, tuple[int, float]] = {}
        """Position to version at its start, and tokens."""
        self.done: list[tuple[int, int]] = []
        self.trained: set[int] = set()
        self.oldest = 0
        self.held: list[int] = []
        self.busy, self.turn, self.next = False, 0, ("ready", 0.0)
        self.left = self.parts
        self.idle_since, self.idle_s, self.saved_at = 0.0, 0.0, 0.0
        self.lags: list[int] = []
        self.tokens = 0.0

    @property
    def parts(self) -> int:
        return self.setup.minibatches if self.setup.streamed else 1

    def run(self, steps: int) -> Simulated:
        setup, begun = self.setup, 0.0
        if setup.failures:
            self._fail_later()
        self._admit()
        while self.version < SETTLE + steps:
            self.now, _, kind, number, stamp = heapq.heappop(self.events)
            match kind:
                case "decoded":
                    if stamp == self.replicas[number].stamp:
                        self._decoded(number)
                case "trained" if stamp == self.turn:
                    self._trained()
                case "ready" if stamp == self.turn:
                    self.busy, self.idle_since = False, self.now
                    self._train()
                case "failed":
                    self._failed()
                case "back":
                    self.replicas[number].down = False
                    self._take_over(number, 0)
                    self._dispatch()
            if self.version == SETTLE and not begun:
                begun, self.lags, self.tokens, self.idle_s = self.now, [], 0.0, 0.0
                self.idle_since = self.now
                for replica in self.replicas:
                    self._advance(replica)
                    replica.busy_s = 0
        took = self.now - begun
        for replica in self.replicas:
            self._advance(replica)
        return Simulated(
            step_s=took / steps,
            trainer_idle=self.idle_s / took,
            sampler_idle=max(0.0, 1 - sum(r.busy_s for r in self.replicas) / took / len(self.replicas)),
            lag=sum(self.lags) / len(self.lags),
            greatest_lag=max(self.lags),
            tokens_s=self.tokens / took / setup.gpus,
        )

    # ------------------------------------------------------------------------------------------ samplers

    def _admit(self) -> None:
        """Groups whose position the lag allows, their answers to the least loaded samplers."""
        setup = self.setup
        while self.started < (self.version + setup.lag + 1) * setup.prompts:
            lengths = [setup.lengths.draw(self.random) for _ in range(setup.samples)]
            self.missing[self.started] = setup.samples
            self.group[self.started] = (-1, sum(lengths))
            self.pending.extend((self.started, length) for length in lengths)
            self.started += 1
        self._dispatch()

    def _dispatch(self) -> None:
        changed = set()
        while self.pending:
            if self.setup.order == "exact":
                self._owe(max(0, self.pending[0][0] // self.setup.prompts - int(self.setup.lag)))
            while self.open and not self._is_open(*self.open[0]):
                heapq.heappop(self.open)
            if not self.open or self.open[0][0] >= self.setup.running:
                break
            load, number = heapq.heappop(self.open)
            position, length = self.pending.popleft()
            replica = self.replicas[number]
            self._advance(replica)
            version, tokens = self.group[position]
            if version < 0:
                began = replica.version if self.setup.order == "exact" else self.version
                self.group[position] = (began, tokens)
            self.count += 1
            heapq.heappush(replica.running, (replica.clock + length, self.count, position, length))
            heapq.heappush(self.open, (load + 1, number))
            changed.add(number)
        for number in sorted(changed):
            self._expect(number)

    def _is_open(self, load: int, number: int) -> bool:
        replica = self.replicas[number]
        return load == len(replica.running) and not replica.down

    def _owe(self, version: int) -> None:
        """The next answers are of this version and no other: a sampler takes it over when it is empty."""
        if version == self.owed:
            return
        self.owed, self.open = version, []
        for number, replica in enumerate(self.replicas):
            if not replica.running:
                self._take_over(number, self.setup.push_s)

    def _take_over(self, number: int, seconds: float) -> None:
        """An empty sampler is ready for the version that is owed after so many seconds."""
        replica = self.replicas[number]
        self._advance(replica)
        replica.version, replica.paused = self.owed, self.now + seconds
        heapq.heappush(self.open, (0, number))

    def _decoded(self, number: int) -> None:
        replica = self.replicas[number]
        self._advance(replica)
        _, _, position, _ = heapq.heappop(replica.running)
        self.missing[position] -= 1
        if self.setup.order == "exact" and replica.version != self.owed:
            if not replica.running:
                self._take_over(number, self.setup.push_s)
        else:
            heapq.heappush(self.open, (len(replica.running), number))
        self._expect(number)
        self._dispatch()
        if not self.missing[position]:
            del self.missing[position]
            self.count += 1
            heapq.heappush(self.done, (self.count if self.setup.order == "any" else position, position))
            self._train()

    def _rate(self, replica: _Replica) -> float:
        return 1 / (self.setup.token_s + self.setup.row_s * len(replica.running))

    def _advance(self, replica: _Replica) -> None:
        """Bring its clock to now; it stood still while it was paused."""
        if replica.running:
            spent = max(0.0, self.now - max(replica.at, min(replica.paused, self.now)))
            replica.clock += spent * self._rate(replica)
            replica.busy_s += spent
        replica.at = self.now

    def _expect(self, number: int) -> None:
        replica = self.replicas[number]
        replica.stamp += 1
        if replica.running:
            wait = max(0.0, replica.running[0][0] - replica.clock) / self._rate(replica)
            self._later(max(0.0, replica.paused - self.now) + wait, "decoded", number, replica.stamp)

    # ------------------------------------------------------------------------------------------- trainer

    def _train(self) -> None:
        """Take what the order allows, and begin with a mini-batch when it is whole."""
        if self.busy:
            return
        setup = self.setup
        size = -(-setup.prompts // self.parts)
        wanted = min(size, setup.prompts - size * (self.parts - self.left))
        reach = {"any": math.inf, "window": max(1, math.ceil(setup.window * (setup.lag + 1) * setup.prompts))}
        while len(self.held) < wanted and self.done:
            if self.done[0][1] >= self.oldest + reach.get(setup.order, 1):
                break
            position = heapq.heappop(self.done)[1]
            self.held.append(position)
            self.trained.add(position)
            while self.oldest in self.trained:
                self.trained.discard(self.oldest)
                self.oldest += 1
        if len(self.held) == wanted:
            self.busy = True
            self.idle_s += self.now - self.idle_since
            self._next(self._updates(), "trained")

    def _updates(self) -> float:
        """Seconds of training on what is held."""
        setup = self.setup
        groups = [self.group.pop(position) for position in self.held]
        tokens = sum(tokens for _, tokens in groups)
        self.lags += [self.version - began for began, _ in groups]
        self.tokens += tokens
        return setup.update_s * setup.minibatches / self.parts + tokens / setup.train_rate / setup.trainer_gpus

    def _trained(self) -> None:
        self.held, self.left = [], self.left - 1
        if self.left:
            self.busy, self.idle_since = False, self.now
            self._train()
            return
        self.left, self.version = self.parts, self.version + 1
        if self.version % self.setup.save_steps == 0:
            self.saved_at = self.now
        if self.setup.order != "exact":
            for number, replica in enumerate(self.replicas):
                self._advance(replica)
                replica.paused = max(replica.paused, self.now) + self.setup.push_s
                self._expect(number)
        self._next(self.setup.push_s, "ready")
        self._admit()

    # ------------------------------------------------------------------------------------------ failures

    def _fail_later(self) -> None:
        self._later(self.random.expovariate(self.setup.failures * self.setup.gpus / DAY_S), "failed")

    def _failed(self) -> None:
        """A GPU: its sampler's answers begin anew elsewhere; or the trainer repeats what follows its checkpoint."""
        setup = self.setup
        self._fail_later()
        if self.random.random() * (setup.trainer_gpus + setup.sampler_gpus) < setup.trainer_gpus:
            lost = setup.restart_s + self.now - self.saved_at
            self.saved_at += lost
            kind, at = self.next if self.busy else ("ready", self.now)
            if not self.busy:
                self.busy, self.idle_s = True, self.idle_s + self.now - self.idle_since
            self._next(at + lost - self.now, kind)
            return
        number = self.random.randrange(len(self.replicas))
        replica = self.replicas[number]
        self._advance(replica)
        self.pending.extendleft((position, length) for _, _, position, length in replica.running)
        replica.running, replica.stamp, replica.down = [], replica.stamp + 1, True
        self._later(setup.restart_s, "back", number)
        self._dispatch()

    def _next(self, seconds: float, kind: str) -> None:
        """What the trainer does next, in place of what it would have done."""
        self.turn += 1
        self.next = kind, self.now + seconds
        self._later(seconds, kind, stamp=self.turn)

    def _later(self, seconds: float, kind: str, number: int = 0, stamp: int = 0) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now + seconds, self.count, kind, number, stamp))


def _normal(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2
