"""Asynchronous rollouts: groups for the next steps are sampled while the trainer works on this one.

It is a ledger. Every position of the stage's order is admitted once, is then in flight, buffered and trained, and keeps
its seeds whatever happens to it; nothing is dropped for its age, and what the machinery failed is issued again. With v
hand-overs made, P groups a step and a lag of L steps, positions below (trained + (L + 1) P) are admitted; which of them
the next step takes is the order (`config.lag`), and so the age of every token is bounded.

    order    a step takes                              oldest token
    exact    the oldest, each sampled at one version   L: the version by which it was admitted
    strict   the oldest                                L
    window   any of the first W                        L + ceil((W - 1) / P)

Positions are played in an event loop of their own; `take` waits, and `publish` admits.
"""

from __future__ import annotations

import json
import threading
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from whet.config.lag import LagConfig
from whet.errors import RunError, SamplersLost, TrainingError
from whet.files import read_json, write_json
from whet.records import Episode, Group, Outcome, State
from whet.rollouts.feed import Feed, Keep, Place, Taken
from whet.rollouts.play import Played
from whet.sampling.base import ApartSampler, LoopThread

ISSUES = 3
"""How often a group is played whose requests the machinery loses, before it is handed on as it is."""
LOOK_S = 1.0
"""Seconds between two checks for progress while waiting."""
LEDGER, GROUPS = "ledger.json", "groups.jsonl"


@dataclass(kw_only=True, eq=False)
class Admitted:
    """A position that is not trained yet."""

    number: int
    """How many were admitted before it."""
    place: Place
    version: int
    """By which it was admitted."""
    group: Group | None = None
    """Once it is played: it is buffered."""
    since: float = field(default_factory=time.monotonic)
    failed: str = ""
    """Why it is played again."""

    def describe(self) -> str:
        """`position 12, admitted at version 3, in flight since 40 s`."""
        again = f" (again, after: {self.failed})" if self.failed else ""
        seconds = time.monotonic() - self.since
        return f"position {self.place[0]}, admitted at version {self.version}, in flight since {seconds:.0f} s{again}"


@dataclass(kw_only=True)
class AheadFeed(Feed):
    """`Feed` with a lag of at least one step. `close` ends what it plays."""

    sampler: ApartSampler
    lag: LagConfig
    prompts_per_step: int
    progress_s: float
    """Longest wait in which no group is finished."""
    version: int = -1
    admitted: int = 0
    trained: int = 0
    _ledger: dict[int, Admitted] = field(default_factory=dict)
    _taken: list[Admitted] = field(default_factory=list)
    """By the step that is being taken: they leave the ledger together, or not at all."""
    _loop: LoopThread = field(default_factory=lambda: LoopThread("whet-rollouts"))
    _moved: threading.Condition = field(default_factory=threading.Condition)
    _progress: float = field(default_factory=time.monotonic)
    _error: BaseException | None = None

    def publish(self, version: int) -> None:
        """Hand the weights over, and admit what may be trained within the lag."""
        super().publish(version)
        self.version = version
        for each in self._ledger.values():
            if each.group is None and not each.since:  # a resumed one
                self._begin(each)
        self._admit(self.trained + min(self.lag.steps + 1, self.steps - version) * self.prompts_per_step, again=True)

    def take(self, count: int, *, step: int, keep: Keep | None = None, rounds: int = 1) -> Taken:
        """`Feed.take`, of positions in the order that the lag gives; `rollout_s` is the time waited."""
        self._taken = []
        taken = super().take(count, step=step, keep=keep, rounds=rounds)
        for each in self._taken:
            self._check_age(each, step)
            del self._ledger[each.number]
        self.trained += len(self._taken)
        gaps = [self.sampler.gaps[v] for v in {each.version for each in self._taken} if v in self.sampler.gaps]
        return replace(taken, gap=max(gaps, default=None))

    @property
    def state(self) -> State:
        """That of the feed, and how many positions were admitted and trained. The groups are in `save`."""
        return {**super().state, "admitted": float(self.admitted), "trained": float(self.trained)}

    def restore(self, state: State) -> None:
        """Stand where the feed stood that gave `state`, with what `load` brought: the rest is played again."""
        self._stand(state)
        self.admitted, self.trained = int(state["admitted"]), int(state["trained"])
        self._ledger = {number: each for number, each in self._ledger.items() if number < self.admitted}

    def save(self, folder: Path) -> None:
        """The ledger and the groups that are buffered; versions of the weights that others are played with."""
        with self._moved:
            rows = [(each, each.group) for each in self._ledger.values()]
        open_ones = {each.number: [*each.place, each.version] for each, _ in rows}
        promised = {"lag": self.lag.model_dump(), "prompts_per_step": self.prompts_per_step}
        write_json(folder / LEDGER, {"open": open_ones, **promised})
        lines = (json.dumps([each.number, as_json(group)]) for each, group in rows if group is not None)
        (folder / GROUPS).write_text("".join(line + "\n" for line in lines))
        self.sampler.save(folder)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; `restore` then drops what is newer than its state.

        Raises `RunError` where it was admitted under a lag that promises less than this one.
        """
        saved = read_json(folder / LEDGER)
        if saved["open"] and "lag" in saved:
            self._refuse_older(LagConfig.model_validate(saved["lag"]), saved["prompts_per_step"], folder)
        self.sampler.load(folder)
        self._ledger = {
            int(number): Admitted(number=int(number), place=(position, task), version=version, since=0.0)
            for number, (position, task, version) in saved["open"].items()
        }
        for line in (folder / GROUPS).read_text().splitlines():
            number, group = json.loads(line)
            self._ledger[number].group = from_json(Group, group)

    def close(self) -> None:
        """Cancel the rollouts in flight."""
        self._loop.close()

    def _refuse_older(self, was: LagConfig, prompts: int, folder: Path) -> None:
        """Groups that were admitted under another lag may be older than this one allows, or of several versions."""
        bound = self.lag.bound(self.prompts_per_step)
        mixed = self.lag.order == "exact" != was.order
        if mixed or self.prompts_per_step < prompts or bound < was.bound(prompts):
            raise RunError(
                f"{folder.parent}: has groups of later steps, which were begun with lag.steps: {was.steps}, order: "
                f"{was.order}, window: {was.window:g} and prompts_per_step: {prompts}; go on with those or with a "
                "greater lag, or --restart the stage"
            )

    # ---------------------------------------------------------------------------------------- the ledger

    def _admit(self, until: int, *, again: bool) -> None:
        """Admit positions up to so many, and begin to play them."""
        for place in self._places(max(0, until - self.admitted), self.version, again=again):
            admitted = Admitted(number=self.admitted, place=place, version=self.version)
            self._ledger[admitted.number], self.admitted = admitted, self.admitted + 1
            self._begin(admitted)

    def _begin(self, admitted: Admitted) -> None:
        admitted.since = self._progress = time.monotonic()
        self._loop.begin(self._fill(admitted))

    async def _fill(self, admitted: Admitted) -> None:
        """Play a position until its group is there; what fails in another way ends the next `take`."""
        version = admitted.version if self.lag.order == "exact" else None
        try:
            for _ in range(ISSUES):
                (group,) = (await self._play([admitted.place], admitted.version, version)).groups
                lost = [each for each in _all(group) if each.outcome is Outcome.ENGINE_ERROR]
                if not lost:
                    break
                admitted.failed = lost[0].score.note
        except Exception as error:  # noqa: BLE001  raised in `take`
            with self._moved:
                self._error = self._error or error
                self._moved.notify_all()
            return
        with self._moved:
            admitted.group, self._progress = group, time.monotonic()
            self._moved.notify_all()

    def _round(self, count: int, step: int, *, first: bool) -> tuple[Sequence[Place], Played]:
        """So many groups of the ledger, once they are there; where more are wanted than were admitted, of new ones."""
        began = time.monotonic()
        self._admit(self.admitted + count - len(self._ledger) + len(self._taken), again=False)
        with self._moved:
            while (chosen := self._choose(count)) is None:
                self._moved.wait(LOOK_S)
                if self._error is not None:
                    raise self._error
                if time.monotonic() - max(began, self._progress) > self.progress_s:  # training is no wait
                    raise SamplersLost(f"step {step + 1}: {self._late()}")
        self._taken += chosen
        groups = tuple(each.group for each in chosen if each.group is not None)
        return [each.place for each in chosen], Played(groups=groups, rollout_s=time.monotonic() - began, score_s=0.0)

    def _choose(self, count: int) -> list[Admitted] | None:
        """The next so many by the order; None while one of them is not there."""
        left = [each for _, each in sorted(self._ledger.items()) if each not in self._taken]
        chosen: list[Admitted] = []
        while len(chosen) < count:
            last = left[0].number + self.lag.window_of(self.prompts_per_step)
            found = next((each for each in left if each.number < last and each.group is not None), None)
            if found is None:
                return None
            left.remove(found)
            chosen.append(found)
        return sorted(chosen, key=lambda each: each.number)

    def _late(self) -> str:
        """Which positions are awaited since when, for an error."""
        waiting = [each for _, each in sorted(self._ledger.items()) if each.group is None]
        first = "; ".join(each.describe() for each in waiting[:3])
        return (
            f"no group was finished for {self.progress_s:g} s (machine.deadlines.progress_s); {len(waiting)} are "
            f"awaited: {first}; from {self.sampler.describe()}"
        )

    def _check_age(self, admitted: Admitted, step: int) -> None:
        """Raise `TrainingError` for a token that is older than the order allows."""
        bound, exact = self.lag.bound(self.prompts_per_step), self.lag.order == "exact"
        assert admitted.group is not None, "only buffered groups are taken"
        for written in (turn.completion for episode in _all(admitted.group) for turn in episode.turns):
            one_version = written.version == admitted.version and not written.later
            if step - written.version > bound or (exact and not one_version):
                allowed = f"version {admitted.version} alone" if exact else f"a lag of at most {bound}"
                raise TrainingError(
                    f"step {step + 1}: position {admitted.place[0]} has tokens of versions "
                    f"{sorted({*written.versions.tolist()})}, and lag.order: {self.lag.order} allows {allowed}; the "
                    "sampler did not keep to it: go on from the last checkpoint"
                )


def _all(group: Group) -> tuple[Episode, ...]:
    return group.episodes if group.greedy is None else (*group.episodes, group.greedy)


# ------------------------------------------------------------- records as JSON and back, exactly, for a checkpoint


def as_json(value: Any) -> Any:
    """A record, with everything in it; its floats are written so that the same come back."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The record of this class that `as_json` wrote; what it holds is read by the annotations of its fields."""
    origin, inside = get_origin(kind), get_args(kind)
    if value is None or kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return from_json(next(each for each in inside if each is not type(None)), value)
    if origin is tuple:
        kinds = [inside[0]] * len(value) if inside[-1] is ... else inside
        return tuple(from_json(each, part) for each, part in zip(kinds, value, strict=True))
    if origin is Mapping:
        return {key: from_json(inside[1], each) for key, each in value.items()}
    if origin is np.ndarray:
        return np.array(value, get_args(inside[1])[0])
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        return kind(**{name: from_json(hints[name], each) for name, each in value.items()})
    return kind(value) if isinstance(kind, type) and issubclass(kind, Enum) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
